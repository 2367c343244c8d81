# The questions of `labdeploy probe`, asked on a host: POSIX sh and coreutils; whatever else is there is asked too.
#
#   facts MODELS_DIR SOFTWARE MODEL... -- RUNNER=PATH... --
#                               SOFTWARE: `software` to ask for Vulkan's software device too, else `-`
#
# A fact is a command. Each line that it prints comes back as `NAME<tab>LINE`, and labdeploy/facts has the parser for
# each name. A command that is not there, fails, or takes too long says nothing: what is unknown stays unknown.
# Nothing is written on the host, and no service is touched.

# shellcheck shell=sh

set -u
export LC_ALL=C
export PATH="$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/rocm/bin"
TAB='	'
ASK_S=20       # an answer of nvidia-smi on a host with eight GPUs that were asleep: 10 s
HELP_S=120     # `vllm serve --help=all` imports for 20-30 s
READ_MIB=256   # a SATA disk needs 2 s for it, and caches of drives are smaller
READ_LEAST_KIB=16384

fact() { # NAME COMMAND...: what it prints, each line with the name before it
    _name=$1
    shift
    "$@" </dev/null 2>/dev/null | head -c 400000 | sed "s/^/$_name$TAB/"
}
both() { "$@" 2>&1; }                             # some programs tell their version on stderr
told() { # NAME COMMAND...: the same for a program that may not be installed, or may hang
    command -v "$2" >/dev/null || return 0
    _told=$1
    shift
    fact "$_told" timeout "$ASK_S" "$@"
}
says() { [ ! -r "$1" ] || printf '%s' "$(head -n 1 "$1" 2>/dev/null)"; }

# --- the machine ----------------------------------------------------------------------------------------------

system() {
    fact os sed -n '/^PRETTY_NAME=/p' /etc/os-release
    fact uname uname -srm
    fact systemd systemd_version
    fact meminfo sed -n '/^\(MemTotal\|MemAvailable\):/p' /proc/meminfo
    fact limits limits
}

systemd_version() { systemctl --version | head -n 1; }

limits() { # what a control group above the services allows: containers and slices have such limits
    for _group in /sys/fs/cgroup /sys/fs/cgroup/system.slice; do
        for _file in cpu.max memory.max; do [ ! -r "$_group/$_file" ] || echo "$_file $(says "$_group/$_file")"; done
    done
    for _group in /sys/fs/cgroup/cpu /sys/fs/cgroup/cpu/system.slice; do
        [ ! -r "$_group/cpu.cfs_quota_us" ] ||
            echo "cpu.max $(says "$_group/cpu.cfs_quota_us") $(says "$_group/cpu.cfs_period_us")"
    done
    for _group in /sys/fs/cgroup/memory /sys/fs/cgroup/memory/system.slice; do
        [ ! -r "$_group/memory.limit_in_bytes" ] || echo "memory.max $(says "$_group/memory.limit_in_bytes")"
    done
    sed -n 's/^Cpus_allowed_list:[[:space:]]*/cpus /p' /proc/1/status
}

cpu() {
    fact cpuinfo cpuinfo
    fact lscpu lscpu_lines
    fact topology topology
}

cpuinfo() { # of the first processor of each kind; a machine with 256 threads says the same thing 256 times
    sed -n '/^\(model name\|flags\|Features\|isa\)[[:space:]]*:/p' /proc/cpuinfo | sort -u
}

lscpu_lines() {
    ! command -v lscpu >/dev/null || timeout "$ASK_S" lscpu |
        sed -n '/^\(On-line CPU(s) list\|Model name\|Core(s) per socket\|Socket(s)\):/p'
}

topology() {
    _cpus=/sys/devices/system/cpu
    echo "online $(says $_cpus/online)"
    for _cpu in "$_cpus"/cpu[0-9]*; do
        [ -r "$_cpu/topology/thread_siblings_list" ] || continue
        echo "core ${_cpu##*/cpu} $(says "$_cpu/topology/thread_siblings_list") $(says "$_cpu/cpu_capacity")"
    done
    for _kind in cpu_core cpu_atom; do
        [ ! -r "/sys/devices/$_kind/cpus" ] || echo "$_kind $(says "/sys/devices/$_kind/cpus")"
    done
    for _node in /sys/devices/system/node/node[0-9]*; do
        [ ! -r "$_node/cpulist" ] || echo "node ${_node##*/node} $(says "$_node/cpulist")"
    done
}

# --- GPUs -----------------------------------------------------------------------------------------------------

NVIDIA='pci.bus_id,uuid,memory.total,memory.free,driver_version'

gpus() {
    fact pci pci
    fact kfd kfd
    fact lspci lspci_gpus
    # a driver from before 2022 does not know compute_cap, and one unknown word fails the whole question
    if command -v nvidia-smi >/dev/null; then
        fact nvidia-smi timeout "$ASK_S" nvidia-smi "--query-gpu=$NVIDIA,compute_cap,name" --format=csv,noheader,nounits
        fact nvidia-smi-old timeout "$ASK_S" nvidia-smi "--query-gpu=$NVIDIA,name" --format=csv,noheader,nounits
    fi
    told amd-smi amd-smi static --asic --bus --vram --driver --json
    told rocm-smi rocm-smi --showproductname --showmeminfo vram --showdriverversion --showbus --showuniqueid --json
    ! command -v xpu-smi >/dev/null || fact xpu-smi xpu_smi
}

pci() { # each display adapter as the kernel has it; what it does not say is left out
    for _dev in /sys/bus/pci/devices/*; do
        case $(says "$_dev/class") in 0x03*) ;; *) continue ;; esac
        printf '%s' "${_dev##*/}"
        for _key in vendor device mem_info_vram_total mem_info_vram_used mem_info_vram_vendor unique_id; do
            [ ! -r "$_dev/$_key" ] || printf ' %s=%s' "$_key" "$(says "$_dev/$_key")"
        done
        [ ! -e "$_dev/driver" ] || {
            _driver=$(readlink "$_dev/driver")
            printf ' driver=%s' "${_driver##*/}"
            [ ! -r "/sys/module/${_driver##*/}/version" ] ||
                printf ' version=%s' "$(says "/sys/module/${_driver##*/}/version")"
        }
        _local=0 # Intel: xe counts by tile, i915 by card
        for _file in "$_dev"/tile*/physical_vram_size_bytes "$_dev"/drm/card*/lmem_total_bytes; do
            [ ! -r "$_file" ] || _local=$((_local + $(says "$_file")))
        done
        [ "$_local" = 0 ] || printf ' local_bytes=%s' "$_local"
        echo
    done
}

kfd() { # the gfx version of AMD GPUs, by their place on the bus
    for _node in /sys/class/kfd/kfd/topology/nodes/*/properties; do
        [ -r "$_node" ] || continue
        sed -n '/^\(gfx_target_version\|location_id\|domain\) /p' "$_node" | tr '\n' ' '
        echo
    done
}

lspci_gpus() { ! command -v lspci >/dev/null || timeout "$ASK_S" lspci -Dnn | grep '\[03[0-9a-f][0-9a-f]\]'; }

xpu_smi() {
    for _id in $(timeout "$ASK_S" xpu-smi discovery -j | tr '{' '\n' | sed -n 's/.*"device_id": *\([0-9]*\).*/\1/p'); do
        timeout "$ASK_S" xpu-smi discovery -d "$_id" -j
    done
}

# --- runners and models ---------------------------------------------------------------------------------------

runner() { # NAME PATH SOFTWARE
    [ -x "$2" ] || return 0
    fact "$1.path" echo "$2"
    case $1 in
    llama-server)
        fact "$1.version" both timeout "$ASK_S" "$2" --version
        fact "$1.help" both timeout "$HELP_S" "$2" --help
        fact "$1.devices" timeout "$ASK_S" "$2" --list-devices
        [ "$3" != software ] || # Vulkan hides its software device unless it is asked for by number
            fact "$1.software" env GGML_VK_VISIBLE_DEVICES=0 timeout "$ASK_S" "$2" --list-devices
        fact "$1.config" ls -d /etc/llama.cpp/config.ini
        ;;
    vllm) # its program takes half a minute to say a version that stands in a file name
        fact "$1.dist" ls -d "$(dirname "$(dirname "$(readlink -f "$2")")")"/lib/python3*/site-packages/vllm-*.dist-info
        fact "$1.help" both timeout "$HELP_S" "$2" serve --help=all
        ;;
    ollama) fact "$1.version" both timeout "$ASK_S" "$2" --version ;;
    esac
}

model() { # PATH: a file's size; a folder's files
    if [ -d "$1" ]; then
        for _file in "$1"/*.safetensors "$1"/*.json; do [ ! -f "$_file" ] || echo "$(stat -Lc %s "$_file") $_file"; done
    elif [ -f "$1" ]; then
        echo "$(stat -Lc %s "$1") $1"
    fi
}

long_enough() { [ -f "$1" ] && [ "$(stat -Lc %s "$1")" -ge $((READ_LEAST_KIB * 1024)) ]; }

largest_file() { # FOLDER: of those that are long enough to measure by
    [ ! -d "$1" ] || timeout "$ASK_S" find -L "$1" -maxdepth 4 -type f -size "+${READ_LEAST_KIB}k" -exec stat -Lc '%s %n' {} + |
        sort -rn | sed -n '1s/^[0-9]* //p'
}

disk() { # FILE: past the page cache, or it would be memory that is measured
    fact disk.file echo "$1"
    fact disk both timeout "$ASK_S" dd "if=$1" of=/dev/null bs=4M count=$((READ_MIB / 4)) iflag=direct
}

facts() {
    _models_dir=$1 _software=$2
    shift 2
    system
    cpu
    gpus
    _big=''
    while [ "$1" != -- ]; do
        fact model model "$1"
        [ -n "$_big" ] || ! long_enough "$1" || _big=$1
        shift
    done
    shift
    _big=${_big:-$(largest_file "$_models_dir")}
    [ -z "$_big" ] || disk "$_big"
    while [ "$1" != -- ]; do
        runner "${1%%=*}" "${1#*=}" "$_software"
        shift
    done
    fact end echo
}

"$@"
