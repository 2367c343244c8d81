# The program that runs on a host, as root: POSIX sh, coreutils, tar, curl and systemd; nothing else.
#
#   push ID HASH BY WATCH_S CONFIRM_S OPTIONS   compare; unless nothing changed, run `txn` with the bundle on stdin
#   rollback ID GENERATION BY WATCH_S CONFIRM_S OPTIONS   the same with a generation that is already here
#                               OPTIONS: `-`, or of `overwrite-drift`, `adopt` and `dry-run` joined by commas
#   txn ...                     the transaction; runs as the transient service labdeploy-txn, whose name is the lock
#   settle                      after txn, however it ended: unless it was confirmed, the old generation comes back
#   recover                     the same at boot, before our units start
#   state | history | files N   what is here, for status, history and diff
#   confirm ID | deny ID WHY    what the controller says to a transaction that waits for it, over a second connection
#
# It answers in lines of tab-separated fields; host.py reads them, and sends what `want` asks for.
# What holds, at every moment:
#   current  -> the generation whose files are installed       good -> the last one that was confirmed
#   pending  exists from before the first installed file changes until all that a switch or its undoing does is done
#   incoming/, undo/   what going forward and going back need, staged before `pending`: on a full disk a rename of
#            what is there still works. A file that is no longer in them has been installed; so every part of the
#            way back can be cut off anywhere and be done again from its start
#   adopted/UNIT   a unit that was here before ours of the same name, moved aside with its drop-ins and links
# Whoever finds `pending` finishes what it says: settle; where that is killed or /etc cannot be written, the service
# labdeploy-recover, at boot and again every few seconds until it succeeds; or the next push.
# Every file is made durable (sync FILE is an fsync) before anything relies on it. The moment of decision is the
# rename of `good`: before it, every way out leads back to the old generation; after it, to the new one.

# What it does for Ollama (stores of models, questions after a start) stands in ollama.sh, and how it sees that nothing is
# to do in unchanged.sh; both are sent ahead of it.

# shellcheck shell=sh disable=SC2015,SC2010,SC2012,SC2016,SC2034,SC2045,SC2046,SC2086,SC2154
# (names of generations, units and services are of [A-Za-z0-9._-] alone, checked before they are sent, so lists of
# them are split at spaces on purpose; `a && b || c` is meant to run c where either fails; awk has its own $1; the others
# read and set variables of this program)

set -u -f
umask 022
export LC_ALL=C
TAB='	'
RUN=/run/labdeploy
TXN=$RUN/txn     # systemd makes it for the transaction and removes it after settle
RECOVER_UNIT=labdeploy-recover.service
RECEIVE_S=60     # a laptop that falls asleep while it sends must not hold the lock
EMPTY=000000     # the generation before the first push
KEEP=10          # generations kept beside current, good and previous
SPACE_KIB=2048   # free in /etc: many times what a generation takes
RUN_KIB=16384    # systemd refuses daemon-reload below 16 MiB free in /run (measured on 257)
PROOF_S=30       # a runner counts its memory in 0.2 to 2 s; a cold driver takes longer

emit() { _ifs=$IFS; IFS=$TAB; printf '%s\n' "$*" 2>/dev/null; IFS=$_ifs; return 0; }
one_line() { tr '\n\t' '  ' | sed 's/  */ /g; s/^ //; s/ $//'; }
generation() { _to=$(readlink "$ROOT/$1" 2>/dev/null) && printf '%s' "${_to#gen/}" || printf '%s' "$EMPTY"; }
number() { _n=${1#"${1%%[!0]*}"}; printf '%s' "${_n:-0}"; }
units_in() { [ ! -e "$1/units" ] || cut -d' ' -f1 "$1/units"; } # FOLDER OF A GENERATION: units in the order they start
units_of() { units_in "$ROOT/gen/$1"; }
service_of() { # UNIT: its service name
    cat "${NEW-}/units" "$ROOT/gen/${FROM-}/units" "$ROOT/gen/${TO-}/units" 2>/dev/null | sed -n "s/^$1 //p" | head -n 1
}
generations() { ls "$ROOT/gen" 2>/dev/null | grep -x '[0-9]\{6\}'; }
centiseconds() { read -r _up _ </proc/uptime; printf '%s' "${_up%.*}${_up#*.}"; }
seconds_since() { _d=$(($(centiseconds) - $1)); printf '%d.%02d' $((_d / 100)) $((_d % 100)); }

refuse() { # CODE WHAT HINT: nothing was changed
    emit refused "$1" "$2" "${3-}"
    exit 20
}

journal() { # EVENT FROM TO RESULT: one durable line, once for each push, however often what it tells of is tried
    _file=$ROOT/journal.jsonl
    [ ! -s "$_file" ] || [ -z "$(tail -c 1 "$_file")" ] || # a line that was cut off
        truncate -s "$(head -n "$(wc -l <"$_file")" "$_file" | wc -c)" "$_file"
    ! grep -qsF "\"event\":\"$1\",\"push_id\":\"$ID\"" "$_file" || return 0
    rm -f "$ROOT/undo/room" # kept for this line
    printf '{"at":"%s","event":"%s","push_id":"%s","by":"%s","from":%s,"to":%s,"changed":[%s],"result":"%s"}\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$ID" "$BY" "$(number "$2")" "$(number "$3")" "$(names_json)" "$4" \
        2>/dev/null >>"$_file" && sync "$_file"
}

names_json() { # the services that changed, as the inside of a JSON list
    for _u in $added $changed $removed $start; do printf '%s\n' "$(service_of "$_u")"; done | sort -u |
        sed 's/.*/"&"/' | tr '\n' ',' | sed 's/,$//'
}

# --- facts of one service: read as data, never run ------------------------------------------------------------

load_service() { # FOLDER OF A GENERATION, NAME
    unit='' ready='' completions='' models='' body='' n_ctx='' deadline_s=60 bind='' port='' gpu='' served=''
    binary='' model='' model_bytes=0 api_key_file='' devices='' groups='' layers=''
    folder=$1 service=$2 ladder='' version='' store='' import='' offload='' first_token_s=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            unit) unit=$_value ;; ready) ready=$_value ;; completions) completions=$_value ;;
            models) models=$_value ;; body) body=$_value ;; n_ctx) n_ctx=$_value ;;
            deadline_s) deadline_s=$_value ;; bind) bind=$_value ;; port) port=$_value ;; gpu) gpu=$_value ;;
            binary) binary=$_value ;; model) model=$_value ;; model_bytes) model_bytes=$_value ;;
            served) served=$_value ;;
            devices) devices=$_value ;; groups) groups=$_value ;; layers) layers=$_value ;;
            api_key_file) api_key_file=$_value ;;
            ladder) ladder=$_value ;; version) version=$_value ;; store) store=$_value ;;
            import) import=$_value ;; offload) offload=$_value ;;
        esac
    done <"$1/services/$2"
}

show() { # UNIT: sets active sub restarts invocation result status
    active='' sub='' restarts=0 invocation='' result='' status='' job=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            ActiveState) active=$_value ;; SubState) sub=$_value ;; NRestarts) restarts=${_value:-0} ;;
            InvocationID) invocation=$_value ;; Result) result=$_value ;; ExecMainStatus) status=$_value ;;
            Job) job=$_value ;;
        esac
    done <<EOF
$(systemctl show -p ActiveState,SubState,NRestarts,InvocationID,Result,ExecMainStatus,Job "$1" 2>/dev/null)
EOF
}

# --- comparing ------------------------------------------------------------------------------------------------

directives() { sed '/^[#;]/d; /^[[:space:]]*$/d' "$1"; }

compare_units() { # OLD NEW, two folders: sets added removed changed touched same, as lists of units
    added='' removed='' changed='' touched='' same=''
    for _u in $(units_in "$2"); do
        _old=$1/systemd/$_u _new=$2/systemd/$_u
        if [ ! -e "$_old" ]; then added="$added $_u"
        elif cmp -s "$_old" "$_new"; then same="$same $_u"
        elif [ "$(directives "$_old")" = "$(directives "$_new")" ]; then touched="$touched $_u"
        else changed="$changed $_u"; fi
    done
    for _u in $(units_in "$1"); do
        [ -e "$2/systemd/$_u" ] || removed="$removed $_u"
    done
}

drift() { # prints what is installed otherwise than the current generation says: `changed UNIT`, `missing UNIT`, ...
    _g=$(generation current)
    for _u in $(units_of "$_g"); do
        if [ ! -e "$UNITS/$_u" ]; then printf 'missing %s\n' "$_u"
        elif ! cmp -s "$UNITS/$_u" "$ROOT/gen/$_g/systemd/$_u"; then printf 'changed %s\n' "$_u"; fi
        [ ! -d "$UNITS/$_u.d" ] || printf 'drop-in %s.d\n' "$_u"
    done
}

unit_states() { # GENERATION: one systemctl call for all; prints `UNIT ACTIVE ENABLED`
    _units=$(units_of "$1")
    [ -n "$_units" ] || return 0
    { systemctl show -p Id,ActiveState,UnitFileState $_units 2>/dev/null; echo; } | while IFS= read -r _line; do
        case $_line in
            Id=*) _id=${_line#*=} ;;
            ActiveState=*) _a=${_line#*=} ;;
            UnitFileState=*) _e=${_line#*=} ;;
            '') printf '%s %s %s\n' "$_id" "$_a" "$_e" ;;
        esac
    done
}

locked() { # refuses where a transaction runs
    _state=$(systemctl show -p ActiveState -p Description "$TXN_UNIT" 2>/dev/null)
    case $_state in
        *ActiveState=active* | *ActiveState=activating* | *ActiveState=deactivating*)
            _who=$(printf '%s\n' "$_state" | sed -n 's/^Description=//p')
            _since=$(systemctl show -p ActiveEnterTimestamp --value "$TXN_UNIT")
            refuse 6 "another push holds it: $_who, since $_since" \
                "wait for it to end; it frees the host itself, whatever happens to it" ;;
    esac
}

# --- push and rollback: compare first, write nothing where nothing changes --------------------------------------

option() { case ",$OPTIONS," in *",$1,"*) return 0 ;; esac; return 1; }

refuse_drift() {
    _found=$(drift | one_line)
    [ -z "$_found" ] || option overwrite-drift ||
        refuse 2 "changed on the host by hand: $_found" "labdeploy diff shows it; push --overwrite-drift replaces it"
}

push() { # ID HASH BY WATCH_S CONFIRM_S OPTIONS; the bundle follows on stdin once it is asked for
    ID=$1 HASH=$2 BY=$3 OPTIONS=$6
    if nothing_to_do "$HASH" && [ -z "$(stale_stores "$ROOT/gen/$FROM")" ]; then
        emit result unchanged "$(number "$FROM")"
        exit 0
    fi
    locked
    FROM=$(generation current)
    emit want bundle
    run_txn push "$@"
}

rollback() { # ID GENERATION BY WATCH_S CONFIRM_S OPTIONS; GENERATION `previous` is the one before the last switch
    ID=$1 BY=$3 OPTIONS=$6
    locked
    _g=$(generation current)
    _to=$2
    if [ "$_to" = previous ]; then
        [ -L "$ROOT/previous" ] || refuse 2 "there is no earlier generation to go back to" "labdeploy history"
        _to=$(generation previous)
    else
        _to=$(printf '%06d' "$_to")
    fi
    [ -d "$ROOT/gen/$_to" ] ||
        refuse 2 "generation $(number "$_to") is not kept here" "labdeploy history  # lists the generations that are"
    if [ "$_to" = "$_g" ] && [ ! -e "$ROOT/pending" ] && [ -z "$(drift)" ]; then
        emit result unchanged "$(number "$_g")"
        exit 0
    fi
    run_txn rollback "$1" "$_to" "$3" "$4" "$5" "$6" </dev/null
}

# Where settle was killed or could not write. (Not OnFailure=: with it systemd 262 sometimes keeps the failed unit.)
UNSETTLED="[ ! -e $ROOT/pending -a ! -e $ROOT/undo -a ! -e $ROOT/incoming ] || exec systemctl start --no-block $RECOVER_UNIT"

run_txn() { # VERB ID TARGET BY WATCH_S CONFIRM_S OPTIONS: the transaction as a service that outlives this connection
    curl --fail-with-body --version >/dev/null 2>&1 ||
        refuse 2 "curl is not installed here, or older than 7.76" "apt-get install curl  # or your system's like"
    _size=$(program | wc -c)
    _n=0 # the unit of a push that has ended stays loaded for a moment more, and its name with it
    while [ "$(systemctl show -p LoadState --value "$TXN_UNIT")" = loaded ] && [ $((_n += 1)) -le 100 ]; do
        locked
        sleep 0.05
    done
    # The program goes in ahead of the bundle; nothing is left behind by a connection that is cut before systemd has it.
    exec 3>&1
    _said=$({ program && cat; } 2>/dev/null | systemd-run --quiet --collect --pipe --wait \
        --service-type=exec --unit="$TXN_UNIT" --description="$1 $2 by $4" \
        -p RuntimeDirectory="${TXN#/run/}" -p RuntimeDirectoryMode=0700 \
        -p RuntimeMaxSec=7200 -p TimeoutStopSec=3600 \
        -p ExecStopPost="-/bin/sh $TXN/program settle" -p ExecStopPost="/bin/sh -c '$UNSETTLED'" \
        /bin/sh -c "timeout $RECEIVE_S head -c $_size >$TXN/program && . $TXN/program" "$TXN/program" txn "$@" \
        2>&1 >&3 3>&-)
    _rc=$?
    case $_said in
        *"already loaded"* | *"already exists"*)
            locked
            refuse 6 "another push held it until just now" "try again" ;;
    esac
    [ $_rc -eq 0 ] || [ -z "$_said" ] || emit stderr "$(printf '%s' "$_said" | one_line)"
    exit $_rc
}

# --- the transaction ------------------------------------------------------------------------------------------

txn() { # VERB ID TARGET BY WATCH_S CONFIRM_S OPTIONS
    VERB=$1 ID=$2 BY=$4 WATCH_S=$5 CONFIRM_S=$6 OPTIONS=$7
    take_over
    VERB=$1 ID=$2 BY=$4
    FROM=$(generation current)
    case $VERB in
        push) receive "$3" ;;
        rollback) fetch "$3" ;;
    esac
    refuse_drift
    decide
    preflight
    ! option dry-run || would
    read_models
    stage
    arm
    switch
    restart_changed
    keep_real
    watch
    confirmed
    commit
}

take_over() { # what an earlier push has left is finished first; from here on nobody else does it
    systemctl stop "$RECOVER_UNIT" 2>/dev/null
    if [ -e "$ROOT/pending" ]; then
        ! option dry-run || refuse 6 "an earlier push was cut off and is being undone" "try again in a moment"
        undo "an earlier push was cut off"
        [ $? -le 1 ] || refuse 1 "an earlier push was cut off and cannot be undone: $reason" \
            "it is tried again every few seconds; a push then just works"
    fi
    option dry-run || tidy
}

fetch() { # GENERATION that is kept here
    TO=$1 NEW=$ROOT/gen/$1
    [ "$1" = "$EMPTY" ] || (cd "$NEW" && sha256sum --quiet -c SHA256SUMS >/dev/null 2>&1) ||
        refuse 2 "generation $(number "$1") is damaged" "labdeploy history  # lists the others"
}

decide() { # what would change, and what the plan was before, for the one who reads the recap
    compare_units "$ROOT/gen/$FROM" "$NEW"
    overwrite "$(stale_stores "$NEW")"
    start=$(not_running "$same $touched")
    adopt='' release=''
    for _u in $added; do ! foreign "$_u" || adopt="$adopt $_u"; done
    for _u in $removed; do [ ! -d "$ROOT/adopted/$_u" ] || release="$release $_u"; done
    dropins=''
    if option overwrite-drift; then
        dropins=$(drift | sed -n 's/^drop-in \(.*\)\.d$/ \1/p' | tr -d '\n')
        overwrite "$(drifted_units)"
    fi
    [ ! -e "$ROOT/gen/$FROM/plan.json" ] || emit plan-before "$(tr -d '\n' <"$ROOT/gen/$FROM/plan.json")"
    [ ! -e "$NEW/plan.json" ] || emit plan-after "$(tr -d '\n' <"$NEW/plan.json")"
}

overwrite() { # UNITS that differ on disk from their generation: installed and restarted again, whatever they are
    for _u in $1; do
        case " $added $changed $removed " in *" $_u "*) continue ;; esac
        changed="$changed $_u"
        touched=$(without "$_u" $touched) same=$(without "$_u" $same) start=$(without "$_u" $start)
    done
}

without() { # WORD WORDS
    _word=$1 && shift
    for _w; do [ "$_w" = "$_word" ] || printf ' %s' "$_w"; done
}

would() { # dry run: the steps that the functions below would take, in their order; nothing is written
    [ "$TO" = "$FROM" ] || emit would "write generation $(number "$TO")"
    for _u in $adopt; do emit would "move $_u aside, with its drop-ins and links"; done
    for _u in $dropins; do emit would "remove $UNITS/$_u.d"; done
    for _u in $(stale_stores "$NEW"); do emit would "make the store of models for $(service_of "$_u")"; done
    for _u in $added $changed $touched; do emit would "install $UNITS/$_u"; done
    for _u in $removed; do emit would "remove $UNITS/$_u"; done
    for _u in $release; do emit would "bring back the $_u that was here before"; done
    emit would "systemctl daemon-reload"
    for _u in $removed; do emit would "systemctl stop $_u"; emit service "$(service_of "$_u")" stopped; done
    for _u in $(units_in "$NEW"); do
        case " $added $start " in *" $_u "*) _do=start _done=started ;; *) _do=restart _done=restarted ;; esac
        case " $added $changed $start " in
            *" $_u "*) emit would "systemctl $_do $_u, until it serves a token"; emit service "$(service_of "$_u")" $_done ;;
        esac
    done
    emit would "watch for $WATCH_S s, confirm over a second connection"
    for _u in $added; do emit deployed "systemd/$_u" ''; done
    for _u in $changed $touched $removed; do
        emit deployed "systemd/$_u" "$(base64 -w 0 "$ROOT/gen/$FROM/systemd/$_u")"
    done
    emit result would-change "$(number "$TO")" "$(number "$FROM")"
    exit 0
}

receive() { # HASH: unpack the bundle into /run and see that it is what was sent
    emit step receive
    mkdir "$TXN/new" && timeout "$RECEIVE_S" tar -xf - -C "$TXN/new" || refuse 1 "the bundle did not arrive whole"
    _hash=$(sha256sum <"$TXN/new/SHA256SUMS")
    [ "${_hash%% *}" = "$1" ] || refuse 1 "the bundle did not arrive whole"
    (cd "$TXN/new" && sha256sum --quiet -c SHA256SUMS >/dev/null 2>&1) || refuse 1 "the bundle did not arrive whole"
    _g=$ROOT/gen/$FROM
    if cmp -s "$_g/SHA256SUMS" "$TXN/new/SHA256SUMS"; then TO=$FROM
    else
        _last=$(generations | tail -n 1)
        TO=$(printf '%06d' $(($(number "${_last:-$EMPTY}") + 1)))
    fi
    NEW=$TXN/new
}

preflight() { # nothing is written on disk yet
    emit step verify
    _store=$ROOT
    [ -d "$_store" ] || _store=${ROOT%/*}
    [ "$(stat -c %d "$_store")" = "$(stat -c %d "$UNITS")" ] ||
        refuse 1 "$_store and $UNITS are on different file systems: a switch between them is not atomic"
    room "$_store" "$SPACE_KIB"
    room /run "$RUN_KIB"
    touch "$UNITS" 2>/dev/null || refuse 1 "$UNITS cannot be written: is it mounted read-only?"
    for _u in $adopt; do
        [ "$VERB" = rollback ] || option adopt ||
            refuse 2 "$_u exists and was not made by labdeploy: $(describe "$_u")" \
                "labdeploy push {host} --adopt  # keeps it aside; rollback brings it back exactly"
    done
    for _u in $(units_in "$NEW"); do
        preflight_service "$_u"
        _said=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no "$NEW/systemd/$_u" 2>&1 |
            grep -F "$_u" | one_line)
        [ -z "$_said" ] || refuse 2 "systemd does not accept $_u: $_said" "labdeploy render --stdout  # look at that unit"
    done
    prove_all
}

room() { # FOLDER KIB
    _free=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ "${_free:-0}" -ge "$2" ] ||
        refuse 1 "only ${_free:-0} KiB are free in $1, $2 are needed" "make room there; nothing was changed"
}

preflight_service() { # UNIT: program, model and key are there, its user can read the model, its port is free
    load_service "$NEW" "$(service_of "$1")"
    set -- "$(service_of "$1")"
    [ -x "$binary" ] || refuse 2 "$1: $binary is not there" "install it, or say where it is: runners: {...: PATH}"
    port_free "$1"
    [ -z "$ladder" ] || preflight_version "$1"
    [ -n "$model" ] || return 0
    preflight_model "$1" "$model" "$model_bytes"
    while read -r _bytes _path; do preflight_model "$1" "$_path" "$_bytes"; done <<EOF
$(beside)
EOF
    [ -z "$api_key_file" ] || [ -s "$api_key_file" ] || refuse 2 "$1: API key file $api_key_file is missing or empty"
    disk_fast_enough "$1"
    [ -z "$store" ] || preflight_store "$1"
}

beside() { # of the service that is loaded: what it reads beside its model, as `BYTES PATH`
    sed -n 's/^beside=//p' "$folder/services/$service"
}

preflight_model() { # NAME PATH BYTES: the file is there, is what the plan is for, and can be read by the service
    [ -n "$2" ] || return 0
    [ -e "$2" ] || refuse 2 "$1: model file $2 is not there" "labdeploy models push {host} ./${2##*/}"
    if [ -f "$2" ]; then
        _size=$(stat -Lc %s "$2")
        case $2 in
            *-of-[0-9][0-9][0-9][0-9][0-9].gguf) ;; # a split model: the plan counts all parts
            *) [ "$_size" = "$3" ] || [ "$3" = 0 ] ||
                refuse 2 "$1: $2 has $_size bytes, the plan is for $3" "copy it again, or inspect it again" ;;
        esac
    fi
    ! command -v setpriv >/dev/null || setpriv --reuid 65534 --regid 65534 --clear-groups test -r "$2" ||
        refuse 2 "$1: $2 is not readable for the service's own user" "chmod a+rX on it and the folders above it"
}

port_free() { # NAME: nobody else listens where it will; who does is told by ss, which names only root's view
    command -v ss >/dev/null || return 0
    ss -Hltnp "sport = :$port" 2>/dev/null | while read -r _ _ _ _at _ _who; do
        case $_at in
            "$bind:$port" | "[$bind]:$port" | "*:$port" | "0.0.0.0:$port" | "[::]:$port") ;;
            *) case $bind in 0.0.0.0 | ::) ;; *) continue ;; esac ;;
        esac
        _pid=$(printf '%s' "$_who" | sed -n 's/.*pid=\([0-9]*\).*/\1/p')
        [ -n "$_pid" ] || continue # not of this host
        _owner=$(sed -n 's|.*/\([^/]*\.service\)$|\1|p' "/proc/$_pid/cgroup" 2>/dev/null | head -n 1)
        [ -z "$_owner" ] || case " $adopt $(units_of "$FROM" | tr '\n' ' ')" in *" $_owner "*) continue ;; esac
        printf 'pid %s of %s' "$_pid" "${_owner:-no unit}"
        break
    done >"$TXN/port"
    [ ! -s "$TXN/port" ] || refuse 2 "$1: port $port is taken by $(cat "$TXN/port")" "stop it, or give the service another port"
}

disk_fast_enough() { # NAME: the model can be read within the time its start is given; measured past the page cache
    [ -f "$model" ] && [ "$model_bytes" -gt 1073741824 ] || return 0
    _t0=$(centiseconds)
    dd if="$model" of=/dev/null bs=1M count=64 iflag=direct 2>/dev/null || return 0
    _cs=$(($(centiseconds) - _t0 + 1))
    _need_s=$((model_bytes * _cs / 1048576 / 6400)) # 64 MiB took _cs hundredths of a second
    [ "$_need_s" -lt "$deadline_s" ] ||
        refuse 2 "$1: reading $model takes about $_need_s s here ($((6400 / _cs)) MiB/s), its start is given $deadline_s s" \
            "write the disk's speed into the inventory: hardware: {disk_read: $((6400 / _cs + 1))MiB, ...}"
}

# --- proof: what each runner counts itself, on this machine, before anything stops ------------------------------------

# llama.cpp's memory breakdown as `NAME DEVICE MODEL CONTEXT COMPUTE FREE`, in MiB; GPUs in the order of `gpus`:
# | - CUDA0 (...) | total = free + (self = model + context + compute) + unaccounted |    | - Host | self = ... |
BREAKDOWN='
BEGIN { FS = "|"; split(gpus, gpu, " ") }
$2 ~ /^ *- / {
    gsub(/[=+()]/, " ", $3); split($3, mib, " "); split($2, word, " ")
    if (word[2] == "Host") { print name, "host", mib[2], mib[3], mib[4], "-"; exit } # the next is of a draft model
    else if (word[2] !~ /^CPU/) print name, gpu[++n], mib[4], mib[5], mib[6], mib[2]
}'

# Its buffers after a start, without those of models beside it, as `NAME DEVICE MODEL CONTEXT COMPUTE`, and `NAME layers
# ON_GPU`. A context that reserves its compute buffers anew has given the ones before back.
BUFFERS='
function place(buffer) {
    if (buffer ~ /^CPU|_Host$|_Mapped$/) return "host"
    number = buffer; sub(/^.*[^0-9]/, "", number)
    return (number + 1 in gpu) ? gpu[number + 1] : buffer
}
function add(kind, where, mib) { sum[kind, where] += mib; if (!(where in seen)) { seen[where]; order[++n] = where } }
BEGIN { split(gpus, gpu, " ") }
/loading draft model|clip_model_loader/ { beside = 1 }
beside { next }
/constructing llama_context/ { context++ }
/buffer size *=/ {
    for (i = 3; i < NF && !($i == "buffer" && $(i + 1) == "size"); i++);
    kind = $(i - 1); buffer = $(i - 2); mib = $(i + 3)
    if (kind == "model") add("model", place(buffer), mib)
    if (kind == "KV" || kind == "RS") add("context", place(buffer), mib)
    if (kind == "compute") { last[context, buffer] = mib; of[context, buffer] = buffer }
}
/offloaded [0-9]+\/[0-9]+ layers/ { for (i = 1; i < NF; i++) if ($i == "offloaded") layers = $(i + 1) + 0 }
END {
    for (each in last) add("compute", place(of[each]), last[each])
    for (i = 1; i <= n; i++) { w = order[i]; print name, w, sum["model", w] + 0, sum["context", w] + 0, sum["compute", w] + 0 }
    if (layers != "") print name, "layers", layers
}'

# Plan and proof of all services beside what is free: `refuse WHAT` and `warn SERVICE WHAT`. One process of a GPU has its
# driver context open while it counts, so `free` lacks that already. 64 MiB: four services, each 16 MiB over its plan.
JUDGE='
function mib(x) { return sprintf("%d MiB", x + 0.5) }
$1 == "starts" { starts[$2] }
$1 == "stops" { freed[$3] += $4 }
$1 == "unknown" { unknown = 1 }
$1 == "available" { free["host"] = $2 }
$1 == "plan" {
    key = $2 " " $3; keys[++n] = key; usable[$3] = $4; plan[key] = $5 + $6 + $7; rest[key] = $8; cache[key] = $9
    if (!($3 in need)) { devices[++m] = $3; need[$3] = 0 }
}
$1 == "proof" {
    key = $2 " " $3; proof[key] = $4 + $5 + $6; parts[key] = $4 " model + " $5 " context + " $6 " compute"
    if ($7 != "-" && (!($3 in free) || $7 > free[$3])) free[$3] = $7
}
END {
    for (i = 1; i <= n; i++) {
        key = keys[i]; split(key, is, " "); service = is[1]; device = is[2]
        own = (key in proof) ? proof[key] : plan[key]
        total[device] += own + rest[key] + cache[key]
        if (service in starts) {
            need[device] += own + rest[key]
            if (rest[key] > most[device]) most[device] = rest[key]
            who[device] = who[device] (who[device] ? " and " : "") service
        }
        if (!(key in proof)) continue
        counts[device] = counts[device] (counts[device] ? ", " : "") service ": " parts[key]
        off = proof[key] - plan[key]
        if ((off > 16 || off < -16) && (off > plan[key] / 10 || off < -plan[key] / 10))
            print "warn", service, "its own count for " device " is " mib(proof[key]) ", the plan says " mib(plan[key])
    }
    for (i = 1; i <= m; i++) {
        device = devices[i]
        if (!(device in counts)) continue
        wants = need[device] - (device == "host" ? 0 : most[device]); room = free[device] + freed[device]
        name = device == "host" ? "main memory" : device
        if (device in free && wants > room)
            print (unknown ? "warn " who[device] : "refuse"), who[device] " needs " mib(wants) " of " name \
                " (" counts[device] " MiB), " mib(room) " are free" (freed[device] ? " once what runs now has stopped" : "")
        else if (total[device] > usable[device] + 64)
            print "refuse", name " is to hold " mib(total[device]) " (" counts[device] " MiB), the inventory leaves " \
                mib(usable[device])
    }
}'

prove_all() { # every service that will start counts its memory, and all together must find room
    : >"$TXN/proofs"
    hung=''
    for _u in $(units_in "$NEW"); do
        case " $added $changed $start " in *" $_u "*) [ -n "$hung" ] || prove "$(service_of "$_u")" ;; esac
    done
    [ -s "$TXN/proofs" ] || return 0
    facts_for_proof | awk "$JUDGE" >"$TXN/verdict"
    while read -r _kind _line; do
        case $_kind in
            warn) emit warning "${_line%% *}" "${_line#* }" ;;
            refuse) # a rollback is tried all the same: where it does not fit, what runs now comes back
                [ "$VERB" = push ] || { emit warning memory "$_line"; continue; }
                refuse 3 "does not fit: $_line" "labdeploy plan {host}  # then a smaller ctx_size, or reserve: what others use" ;;
        esac
    done <"$TXN/verdict"
}

prove() { # NAME: its own build, with its own command line, says what it will allocate; it is ended before it does
    load_service "$NEW" "$1"
    _name=$1
    set -- env -i "PATH=$PATH" "HOME=$TXN"
    while IFS= read -r _line; do
        case $_line in env=*) set -- "$@" "${_line#*=}" ;; esac
    done <"$NEW/services/$_name"
    _bare=$#
    while IFS= read -r _line; do
        case $_line in proof=*) set -- "$@" "${_line#*=}" ;; esac
    done <"$NEW/services/$_name"
    [ $# -gt "$_bare" ] || return 0
    emit step prove "$_name"
    as_nobody "$@" >"$TXN/said" 2>&1 </dev/null &
    _pid=$! _until=$(($(centiseconds) + PROOF_S * 100))
    until grep -q '| *- Host ' "$TXN/said"; do
        kill -0 "$_pid" 2>/dev/null || break
        [ "$(centiseconds)" -lt "$_until" ] || { hung=$_name; break; } # one that hangs is waited for, not all
        sleep 0.05
    done
    kill -9 "$_pid" 2>/dev/null
    wait "$_pid" 2>/dev/null
    awk -v name="$_name" -v gpus="$devices" "$BREAKDOWN" "$TXN/said" >"$TXN/proof"
    if [ -s "$TXN/proof" ]; then cat "$TXN/proof" >>"$TXN/proofs"
    else emit warning "$_name" "did not count its memory before the start: $(tail -n 2 "$TXN/said" | one_line)"; fi
}

as_nobody() { # COMMAND...: with the rights that the service will have, as far as files and devices go
    command -v setpriv >/dev/null || exec "$@"
    _ids=$(for _g in $groups; do getent group "$_g" | cut -d: -f3; done | tr '\n' ',')
    if [ -n "$_ids" ]; then exec setpriv --reuid 65534 --regid 65534 --groups "${_ids%,}" --no-new-privs "$@"
    else exec setpriv --reuid 65534 --regid 65534 --clear-groups --no-new-privs "$@"; fi
}

facts_for_proof() { # what JUDGE reads
    sed 's/^/proof /' "$TXN/proofs"
    sed -n 's/^MemAvailable: *\([0-9]*\) .*/\1/p' /proc/meminfo | while read -r _kib; do echo "available $((_kib / 1024))"; done
    for _u in $(units_in "$NEW"); do
        _name=$(service_of "$_u")
        sed -n "s/^device=/plan $_name /p" "$NEW/services/$_name"
        case " $added $changed $start " in *" $_u "*) echo "starts $_name" ;; esac
    done
    for _u in $changed $removed $adopt; do
        [ "$(systemctl is-active "$_u")" != active ] || held "$_u"
    done
}

held() { # UNIT that will be stopped: what it gives back of each device
    for _pid in $(pids_of "$1"); do
        sed -n 's/^RssAnon: *\([0-9]*\) .*/\1/p' "/proc/$_pid/status" 2>/dev/null
    done | awk '{ kib += $1 } END { print "stops", "-", "host", kib / 1024 }'
    _old=$ROOT/gen/$FROM/services/$(service_of "$1")
    if grep -qs '^device=' "$_old"; then
        sed -n 's/^device=\(gpu[0-9]*\) /\1 /p' "$_old" | while read -r _device _ _m _c _k _rest _; do
            echo "stops - $_device $((_m + _c + _k + _rest))"
        done
    else echo unknown; fi
}

read_back() { # GENERATION NAME: what this very start allocated, from its journal; as many layers on GPUs as planned
    grep -qs '^proof=' "$ROOT/gen/$1/services/$2" || return 0
    journalctl --quiet --no-pager -o cat "_SYSTEMD_INVOCATION_ID=$invocation" 2>/dev/null |
        awk -v name="$2" -v gpus="$devices" "$BUFFERS" >"$TXN/buffers"
    cat "$TXN/buffers" >>"$TXN/real"
    _on=$(sed -n 's/^[^ ]* layers //p' "$TXN/buffers")
    [ -z "$layers" ] || [ "${_on:-$layers}" -ge "$layers" ] ||
        { unhealthy GPU "$layers layers were planned on it, $_on are there"; return 1; }
}

keep_real() { # what was read back, beside the plan of its generation; of services that went on, what was known of them
    [ -s "$TXN/real" ] || return 0
    {
        cat "$TXN/real"
        [ ! -e "$ROOT/gen/$FROM/real" ] || while read -r _name _line; do
            grep -q "^$_name " "$TXN/real" || [ ! -e "$NEW/services/$_name" ] || echo "$_name $_line"
        done <"$ROOT/gen/$FROM/real"
    } | put "$ROOT/gen/$TO/real"
}

# --- adoption: a unit that was here before ours, moved aside whole and brought back exactly -------------------------

foreign() { # UNIT: is one of that name here that no generation of ours put there?
    [ ! -e "$ROOT/gen/$FROM/systemd/$1" ] || return 1
    [ -e "$UNITS/$1" ] || [ -L "$UNITS/$1" ] || [ -d "$UNITS/$1.d" ] ||
        [ "$(systemctl show -p LoadState --value "$1")" = loaded ]
}

foreign_paths() { # UNIT: all that belongs to it below the units' folder: file, drop-ins, links that enable or alias it
    (
        cd "$UNITS" || exit
        for _p in "$1" "$1.d"; do { [ -e "$_p" ] || [ -L "$_p" ]; } && printf '%s\n' "$_p"; done
        find . -mindepth 2 -maxdepth 2 -type l -name "$1" | sed 's|^\./||'
        find . -maxdepth 1 -type l -lname "*$1" ! -name "$1" | sed 's|^\./||'
    )
}

describe() { # UNIT: what was found, in a line
    _file=$(systemctl show -p FragmentPath --value "$1")
    _state=$(systemctl show -p ActiveState --value "$1")
    _enabled=$(systemctl is-enabled "$1" 2>/dev/null)
    _dropins=$(systemctl show -p DropInPaths --value "$1")
    printf '%s' "${_file:-$UNITS/$1}, $_state, ${_enabled:-not enabled}${_dropins:+, with drop-ins $_dropins}"
}

take_away() { # UNIT: by renames alone, along the list that was made durable before; what is away already is left
    if [ -d "$ROOT/incoming/adopted/$1" ]; then
        mv -T "$ROOT/incoming/adopted/$1" "$ROOT/adopted/$1" || return 1
    fi
    while IFS= read -r _p; do
        _away=$ROOT/adopted/$1/tree/$_p
        if [ -e "$_away" ] || [ -L "$_away" ]; then continue; fi # then what has its place is ours
        if [ -e "$UNITS/$_p" ] || [ -L "$UNITS/$_p" ]; then mv -T "$UNITS/$_p" "$_away" || return 1; fi
    done <"$ROOT/adopted/$1/paths"
    durable "$ROOT/adopted"
}

bring_home() { # UNIT: the way back; what is home already is left
    [ -e "$ROOT/adopted/$1/paths" ] || return 0
    while IFS= read -r _p; do
        _away=$ROOT/adopted/$1/tree/$_p
        if [ -e "$_away" ] || [ -L "$_away" ]; then
            mkdir -p "$UNITS/$(dirname "$_p")" && mv -T "$_away" "$UNITS/$_p" || return 1
        fi
    done <"$ROOT/adopted/$1/paths"
}

restart_foreign() { # UNIT: as it was before it was adopted
    # before it was moved aside, what it was like still lies in incoming
    if [ "$(cat "$ROOT/adopted/$1/state" "$ROOT/incoming/adopted/$1/state" 2>/dev/null)" = active ]; then
        systemctl reset-failed "$1" 2>/dev/null
        systemctl restart ${NO_WAIT-} "$1" || reason="$1: does not start any more"
        [ -n "${NO_WAIT-}" ] || [ "$(systemctl is-active "$1")" = active ]
    else
        systemctl stop ${NO_WAIT-} "$1" 2>/dev/null
    fi
}

# --- forward ----------------------------------------------------------------------------------------------------

read_models() { # of what will restart, into the page cache: what serves now goes on meanwhile, and is away for less long
    _room=$(sed -n 's/^MemAvailable: *\([0-9]*\) .*/\1/p' /proc/meminfo)
    for _u in $changed $adopt; do
        load_service "$NEW" "$(service_of "$_u")"
        while read -r _bytes _path; do read_model "$_path" $((_bytes / 1024)); done <<EOF
$model_bytes $model
$(beside)
EOF
    done
}

read_model() { # PATH KIB: one that is larger than what is left of the memory would push itself out
    [ -e "$1" ] && [ "$2" -gt 0 ] && [ "$2" -lt "${_room:-0}" ] || return 0
    _room=$((_room - $2))
    emit step read "$service"
    case $1 in
        *-00001-of-*.gguf)
            _name=${1##*/}
            set -- "${1%/*}" -maxdepth 1 -name "${_name%-00001-of-*}-*-of-${_name##*-of-}" ;;
        *) set -- "$1" ;;
    esac
    timeout "$deadline_s" find -L "$@" -type f -exec cat {} + >/dev/null 2>&1
}

tidy() { # what was staged and is needed no more; never while `pending` is there
    [ ! -e "$ROOT/pending" ] || return 0
    rm -rf "$ROOT/undo" "$ROOT/incoming" "$RUN/back" || return 1 # labdeploy-recover tries again
    prune_stores || return 0
}

stage() { # the new generation, durable, beside those that are kept
    emit step stage "$(number "$TO")"
    mkdir -p "$ROOT/gen" "$ROOT/bin" "$ROOT/adopted" && mkdir "$ROOT/undo" "$ROOT/incoming" ||
        refuse 1 "cannot write $ROOT"
    install_program
    [ -d "$ROOT/gen/$EMPTY" ] || stage_empty || refuse 1 "cannot write $ROOT"
    tell_adopted || refuse 1 "cannot write $ROOT"
    make_stores
    [ "$VERB" = push ] && [ "$TO" != "$FROM" ] || return 0
    cp -R "$NEW" "$ROOT/incoming/gen" 2>/dev/null && durable "$ROOT/incoming/gen" ||
        refuse 1 "the new generation does not fit in $ROOT" "make room there; nothing was changed"
}

stage_empty() { # what was here before the first push: nothing, or units that were adopted
    _g=$ROOT/incoming/empty
    mkdir "$_g" && : >"$_g/SHA256SUMS" && durable "$_g" && mv -T "$_g" "$ROOT/gen/$EMPTY" &&
        sync "$ROOT/gen" "$ROOT" "${ROOT%/*}"
}

tell_adopted() {
    [ -n "$adopt" ] && [ ! -e "$ROOT/gen/$EMPTY/manifest.json" ] || return 0
    printf '{"push_id":"%s","by":"%s","at":"%s","adopted":true}\n' "$ID" "$BY" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" |
        put "$ROOT/gen/$EMPTY/manifest.json"
}

durable() { # DIR: fsync every file below it, then every folder
    find "$1" -type f -exec sync {} + && find "$1" -type d -exec sync {} +
}

sync_units() { find "$UNITS" -maxdepth 1 -type d -exec sync {} +; } # and the folders of links that enable units

install_program() { # this program, and the unit that runs it at boot and wherever settle could not do its work
    program | put "$ROOT/bin/labdeploy-host" || refuse 1 "cannot write $ROOT/bin"
    put "$UNITS/$RECOVER_UNIT" <<EOF || refuse 1 "cannot write $UNITS"
[Unit]
Description=Finish or undo a labdeploy push that was cut off
ConditionPathExists=|$ROOT/pending
ConditionPathExists=|$ROOT/undo
ConditionPathExists=|$ROOT/incoming
DefaultDependencies=no
After=local-fs.target
Conflicts=shutdown.target
Before=shutdown.target
StartLimitIntervalSec=0

[Service]
Type=oneshot
ExecStart=/bin/sh $ROOT/bin/labdeploy-host recover
Restart=on-failure
RestartSec=3

[Install]
WantedBy=multi-user.target
EOF
    [ -L "$UNITS/multi-user.target.wants/$RECOVER_UNIT" ] || systemctl enable --quiet --no-reload "$RECOVER_UNIT" ||
        refuse 1 "cannot enable $RECOVER_UNIT"
    sync_units
}

put() { # FILE, content on stdin: written aside, made durable, renamed; untouched where it is the same
    _aside=$ROOT/incoming/${1##*/}
    cat 2>/dev/null >"$_aside" && sync "$_aside" || return 1
    cmp -s "$1" "$_aside" || { mv -T "$_aside" "$1" && sync "${1%/*}"; }
}

not_running() { # UNITS: prints those that are not active
    for _u in $1; do
        [ "$(systemctl is-active "$_u")" = active ] || printf ' %s' "$_u"
    done
}

drifted_units() { drift | sed -n 's/^\(changed\|missing\|drop-in\) / /; s/\.d$//; p' | tr -d '\n'; }

arm() { # all that is needed to go either way, durable, before the first installed file changes
    emit step arm
    was_active='' was_disabled=''
    for _u in $changed $removed $adopt; do
        show "$_u"
        [ "$active" != active ] || was_active="$was_active $_u=$invocation"
    done
    [ "$FROM" = "$EMPTY" ] || was_disabled=$(unit_states "$FROM" | sed -n '/ enabled$/d; / masked$/d; / $/d; s/ .*//p' | tr '\n' ' ')
    stage_forward && stage_back && durable "$ROOT/incoming" && durable "$ROOT/undo" && sync "$ROOT" &&
        intent armed | put "$ROOT/pending" ||
        refuse 1 "no room in $ROOT for what an undo needs" "make room there; nothing was changed"
}

stage_forward() {
    ln -s "gen/$TO" "$ROOT/incoming/current" && ln -s "gen/$TO" "$ROOT/incoming/good" &&
        ln -s "gen/$FROM" "$ROOT/incoming/previous" || return 1
    for _u in $added $changed $touched; do
        cp "$NEW/systemd/$_u" "$ROOT/incoming/$_u" || return 1
    done
    for _u in $adopt; do
        _place=$ROOT/incoming/adopted/$_u
        mkdir -p "$_place/tree" && foreign_paths "$_u" >"$_place/paths" || return 1
        systemctl show -p ActiveState --value "$_u" >"$_place/state" || return 1
        grep / "$_place/paths" | while IFS= read -r _p; do mkdir -p "$_place/tree/${_p%/*}" || exit 1; done || return 1
    done
}

stage_back() {
    ln -s "gen/$FROM" "$ROOT/undo/current" || return 1
    for _u in $changed $touched $removed; do # what was deleted or masked by hand comes back as it was pushed
        _is=$UNITS/$_u
        [ -f "$_is" ] || _is=$ROOT/gen/$FROM/systemd/$_u
        cp -pP "$_is" "$ROOT/undo/$_u" || return 1
    done
    intent committed >"$ROOT/undo/committed" && intent restored >"$ROOT/undo/restored" &&
        head -c 8192 /dev/zero >"$ROOT/undo/room"
}

intent() { # PHASE: what `pending` says; `armed` becomes `committed` or `restored` by a rename
    printf '%s\n' "phase=$1" "id=$ID" "by=$BY" "verb=$VERB" "from=$FROM" "to=$TO" "added=$added" "changed=$changed" \
        "touched=$touched" "removed=$removed" "start=$start" "adopt=$adopt" "release=$release" \
        "dropins=$dropins" "was_active=$was_active" "was_disabled=$was_disabled"
}

turn() { # PHASE
    [ ! -e "$ROOT/undo/$1" ] || mv -T "$ROOT/undo/$1" "$ROOT/pending" && sync "$ROOT"
}

fail() { # WHAT: from here on the way out is settle, which puts the old generation back
    emit failed "$1"
    exit 21
}

place() { # FOLDER NAME GENERATION: put a link in its place, in one rename; staged only now where `pending` is older
    if [ "$(readlink "$ROOT/$2" 2>/dev/null)" != "gen/$3" ]; then
        [ -L "$ROOT/$1/$2" ] || ln -s "gen/$3" "$ROOT/$1/$2" || return 1
        mv -T "$ROOT/$1/$2" "$ROOT/$2" || return 1
    fi
    sync "$ROOT"
}

place_generation() {
    [ ! -d "$ROOT/incoming/gen" ] || mv -T "$ROOT/incoming/gen" "$ROOT/gen/$TO" && sync "$ROOT/gen"
}

switch() { # install the new files, then let systemd read them
    emit step switch "$(number "$TO")"
    place_generation || fail "cannot write $ROOT/gen"
    NEW=$ROOT/gen/$TO
    for _u in $adopt; do
        take_away "$_u" || fail "cannot move $_u aside"
    done
    for _u in $dropins; do
        mv -T "$UNITS/$_u.d" "$ROOT/undo/$_u.d" || fail "cannot move $_u.d aside"
    done
    for _u in $added $changed $touched; do
        mv -T "$ROOT/incoming/$_u" "$UNITS/$_u" || fail "cannot install $_u"
    done
    for _u in $removed; do
        systemctl disable --quiet --no-reload "$_u" 2>/dev/null
        rm -f "$UNITS/$_u" || fail "cannot remove $_u"
    done
    for _u in $release; do
        bring_home "$_u" || fail "cannot bring $_u back"
    done
    enable_units "$added $changed $touched $same"
    sync_units || fail "cannot write $UNITS"
    place incoming current "$TO" || fail "cannot switch $ROOT/current"
    reload "$added $changed $touched"
}

enable_units() { # UNITS
    [ -z "$(printf '%s' "$1" | tr -d ' ')" ] || systemctl enable --quiet --no-reload $1 2>/dev/null ||
        fail "cannot enable $1"
}

reload() { # UNITS: daemon-reload says 0 even where a unit is garbage, so each is asked for
    _said=$(systemctl daemon-reload 2>&1) || fail "daemon-reload: $(printf '%s' "$_said" | one_line)"
    for _u in $1; do
        [ "$(systemctl show -p LoadState --value "$_u")" = loaded ] || fail "systemd did not load $_u"
    done
}

restart_changed() { # stop what is gone, then restart what changed, one after another in the order units ask for
    FORWARD=1
    for _u in $removed; do
        systemctl stop "$_u" 2>/dev/null
        systemctl reset-failed "$_u" 2>/dev/null
        emit service "$(service_of "$_u")" stopped
    done
    for _u in $release; do
        restart_foreign "$_u" || fail "$reason"
    done
    for _u in $(units_of "$TO"); do
        case " $changed $added $start " in *" $_u "*) bring_up "$TO" "$_u" || fail "$reason" ;; esac
    done
}

bring_up() { # GENERATION UNIT: (re)start it and see that it serves; 1 with `reason` set otherwise
    _name=$(service_of "$2")
    load_service "$ROOT/gen/$1" "$_name"
    show "$unit"
    _action=started
    [ "$active" != active ] || _action=restarted
    _before=$invocation _t0=$(centiseconds)
    emit step "$_action" "$_name" "$deadline_s"
    systemctl reset-failed "$unit" 2>/dev/null
    systemctl restart "$unit" >/dev/null 2>&1 &
    wait_active "$_before" "$((_t0 + deadline_s * 100))" $! || return 1
    _down=$(seconds_since "$_t0")
    emit step probe "$_name"
    serves || return 1
    read_back "$1" "$_name" || return 1
    emit service "$_name" "$_action" "$_down" "$first_token_s"
}

wait_active() { # OLD_INVOCATION DEADLINE PID: until the new process says it is ready (ExecStartPost polls it)
    # PID is the systemctl that waits for the start. While it does, nothing else is asked: an answer costs 11 ms of
    # processor time, and a runner that warms up on all cores waits for the slowest of them.
    while :; do
        if denied; then return 1; fi # it may wait for a host that will not come
        _late=''
        [ "$(centiseconds)" -le "$2" ] || _late=1
        if [ -n "$_late" ] || ! kill -0 "$3" 2>/dev/null; then
            show "$unit"
            if [ "$invocation" != "$1" ]; then
                [ "$active" != active ] || return 0
                case $active$sub in
                    failed* | activatingauto-restart* | inactive*)
                        reason="$_name: ended while it started: $result, exit status $status"
                        last_words
                        return 1 ;;
                esac
            elif [ "${job:-0}" = 0 ]; then
                reason="$_name: systemd did not start it: is $model there? (ConditionPathExists)"
                return 1
            fi
        fi
        if [ -n "$_late" ]; then
            reason="$_name: not ready after $deadline_s s ($active, $sub)"
            last_words
            return 1
        fi
        sleep 0.1
    done
}

last_words() { # the last journal lines of this very start, for the one who has to read why
    journalctl --quiet --no-pager -o cat -n 15 "_SYSTEMD_INVOCATION_ID=$invocation" + "INVOCATION_ID=$invocation" \
        2>/dev/null | while IFS= read -r _line; do
        emit log "$_name" "$_line"
    done
}

http() { # TIMEOUT_S URL [BODY [WRITE_OUT]]: the answer on stdout; the API key never stands in a command line
    if [ -n "$api_key_file" ]; then
        printf 'header = "Authorization: Bearer %s"\n' "$(head -n 1 "$api_key_file")"
    fi | curl -sS --fail-with-body -m "$1" -K - -H 'Content-Type: application/json' \
        ${3:+--data "$3"} ${4:+-w "$4"} "$2" 2>&1
}

serves() { # ready, one token, and the context that was planned
    [ -n "$ready" ] || return 0 # a worker of a span answers nobody; its start was over when it had joined
    _said=$(http 10 "$ready") || { unhealthy "$ready" "$_said"; return 1; }
    case $ladder in ollama) ladder_ollama; return ;; esac
    _said=$(http "$deadline_s" "$completions" "$body") || { unhealthy "one-token completion" "$_said"; return 1; }
    [ -z "$gpu" ] || gpu_in_use || { unhealthy GPU "planned, but its process has none open: it runs on the CPU"; return 1; }
    [ -n "$n_ctx" ] || return 0
    _ctx=$(http 10 "$models" | tr ',{}' '[\n*]' | sed -n 's/^ *"n_ctx": *\([0-9]*\).*/\1/p' | head -n 1)
    [ -z "$_ctx" ] || [ "$_ctx" = "$n_ctx" ] || { unhealthy context "serves $_ctx tokens, $n_ctx were planned"; return 1; }
}

pids_of() { # UNIT
    _group=$(systemctl show -p ControlGroup --value "$1")
    { cat "/sys/fs/cgroup$_group/cgroup.procs" "/sys/fs/cgroup/systemd$_group/cgroup.procs" 2>/dev/null
      systemctl show -p MainPID --value "$1"; } | sort -u
}

gpu_in_use() { # a runner that fell back to the CPU answers 200; one that computes on a GPU has its device mapped
    for _pid in $(pids_of "$unit"); do
        ! grep -qE '/dev/(nvidia[0-9]|dri/render|kfd)|libvulkan_lvp|swrast|llvmpipe' "/proc/$_pid/maps" 2>/dev/null || return 0
        ! find "/proc/$_pid/fd" -type l -lname '/dev/*' -printf '%l\n' 2>/dev/null |
            grep -qE '/dev/(nvidia[0-9]|dri/render|kfd)' || return 0
    done
    return 1
}

unhealthy() { # WHAT SAID
    reason="$_name: $1: $(printf '%s' "$2" | one_line)"
    last_words
}

watch() { # a while longer: a service that crashes seconds after its first answer is not healthy
    set -- $changed $added $start
    [ $# -gt 0 ] || return 0
    emit step watch "$WATCH_S"
    _until=$(($(centiseconds) + WATCH_S * 100))
    while [ "$(centiseconds)" -lt "$_until" ]; do
        still_up "$@"
        sleep 0.5
    done
}

still_up() { # UNIT...
    for _u in "$@"; do
        show "$_u"
        if [ "$active" != active ] || [ "$restarts" -gt 0 ]; then
            unit=$_u _name=$(service_of "$_u")
            last_words
            fail "$_name: was ready, then stopped: $active, $sub, $result, $restarts restarts"
        fi
    done
}

confirmed() { # the controller reaches this host over a new connection, or the old generation comes back
    emit confirm "$ID"
    _until=$(($(centiseconds) + CONFIRM_S * 100))
    until [ -e "$TXN/confirmed-$ID" ]; do
        if denied; then fail "$reason"; fi
        [ "$(centiseconds)" -lt "$_until" ] || fail "nobody confirmed within $CONFIRM_S s"
        sleep 0.05
    done
    still_up $changed $added $start # hosts of a span wait long for one another
}

denied() { # heard only on the way forward
    [ -n "${FORWARD-}" ] && [ -e "$TXN/denied-$ID" ] && reason=$(cat "$TXN/denied-$ID")
}

commit() { # the rename of `good` decides
    place incoming good "$TO" || fail "cannot write $ROOT"
    finish || exit 22 # settle goes on
    emit result changed "$(number "$TO")" "$(number "$FROM")"
}

finish() { # all that follows the decision; every part can be done again
    reason="cannot write $ROOT"
    turn committed || return 1
    [ "$FROM" = "$TO" ] || place incoming previous "$FROM" || return 1
    for _u in $release; do rm -rf "$ROOT/adopted/$_u" || return 1; done
    journal "$VERB" "$FROM" "$TO" ok && prune && close
}

close() { # nothing is pending any more; tidy is told by the two folders where it is cut off
    rm -f "$ROOT/pending" && sync "$ROOT" && rm -rf "$RUN/back" "$ROOT/undo" "$ROOT/incoming"
}

prune() { # the oldest generations beyond KEEP, but never one that runs or that a rollback needs; whole, by a rename
    for _g in $(generations | head -n -"$KEEP"); do
        case $_g in
            "$EMPTY" | "$(generation current)" | "$(generation good)" | "$(generation previous)") continue ;;
        esac
        mv -T "$ROOT/gen/$_g" "$ROOT/undo/$_g" || return 1
    done
    sync "$ROOT/gen"
}

# --- going back -----------------------------------------------------------------------------------------------

load_pending() {
    phase=armed ID='' BY='' VERB=push FROM=$EMPTY TO=$EMPTY added='' changed='' touched='' removed='' start='' was_active=''
    adopt='' release='' dropins='' was_disabled=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            phase) phase=$_value ;; was_disabled) was_disabled=$_value ;;
            id) ID=$_value ;; by) BY=$_value ;; verb) VERB=$_value ;; from) FROM=$_value ;; to) TO=$_value ;;
            added) added=$_value ;; changed) changed=$_value ;; touched) touched=$_value ;;
            removed) removed=$_value ;; start) start=$_value ;; was_active) was_active=$_value ;;
            adopt) adopt=$_value ;; release) release=$_value ;; dropins) dropins=$_value ;;
        esac
    done <"$ROOT/pending"
}

restore() { # the installed files as they were: renames and removals, so that a full disk cannot stop it
    reason="cannot write $UNITS and $ROOT"
    place_generation || return 1 # it stays, as one that failed: its number is not used again
    for _u in $added; do
        uninstall "$_u" || return 1
    done
    for _u in $dropins; do
        [ ! -d "$ROOT/undo/$_u.d" ] || mv -T "$ROOT/undo/$_u.d" "$UNITS/$_u.d" || return 1
    done
    for _u in $adopt; do bring_home "$_u" || return 1; done
    for _u in $release; do
        [ ! -e "$ROOT/undo/$_u" ] || take_away "$_u" || return 1
    done
    for _u in $changed $touched $removed; do
        [ ! -e "$ROOT/undo/$_u" ] || mv -T "$ROOT/undo/$_u" "$UNITS/$_u" || return 1
    done
    for _u in $removed; do
        systemctl enable --quiet --no-reload "$_u" 2>/dev/null || return 1
    done
    for _u in $was_disabled; do systemctl disable --quiet --no-reload "$_u" 2>/dev/null; done
    sync_units && place undo current "$FROM"
}

uninstall() { # UNIT, back to where it came from: if it is still there, what is installed is not ours
    [ ! -e "$ROOT/incoming/$1" ] || return 0
    systemctl disable --quiet --no-reload "$1" 2>/dev/null
    mv -T "$UNITS/$1" "$ROOT/incoming/$1" || [ ! -e "$UNITS/$1" ]
}

undo() { # WHY: the old generation, files and processes, and `bad` is what did not come back
    # 1: it had been confirmed, and is finished now; 2: it cannot be done yet, for `reason`
    bad='' reason=''
    load_pending
    if [ "$phase" = committed ] || { [ "$TO" != "$FROM" ] && [ "$(generation good)" = "$TO" ]; }; then
        finish || return 2
        return 1
    fi
    _host=$(systemctl is-system-running 2>/dev/null)
    if [ "$phase" != restored ]; then
        restore || return 2
        [ "$_host" = stopping ] || _said=$(systemctl daemon-reload 2>&1) || { reason="daemon-reload: $_said"; return 2; }
        turn restored || return 2
    fi
    emit step back "$(number "$FROM")"
    [ "$_host" = stopping ] || bring_back
    for _u in $adopt; do rm -rf "$ROOT/adopted/$_u"; done
    reason="cannot write $ROOT"
    journal settle "$TO" "$FROM" "$1" && close || return 2
}

bring_back() { # the processes of the old generation, in the order they start; what was never touched goes on serving
    mkdir -p "$RUN/back"
    for _u in $added; do
        case " $adopt " in *" $_u "*) continue ;; esac
        systemctl stop ${NO_WAIT-} "$_u" 2>/dev/null
        systemctl reset-failed "$_u" 2>/dev/null
    done
    for _u in $(units_of "$FROM"); do
        case " $changed $removed " in *" $_u "*) touched_since "$_u" && bring_unit_back "$_u" ;; esac
    done
    for _u in $adopt; do
        touched_since "$_u" || continue
        restart_foreign "$_u" || bad="$bad $reason;"
        : >"$RUN/back/$_u"
    done
}

touched_since() { # UNIT: does anything but the process from before the switch run, and was it not brought back yet?
    [ ! -e "$RUN/back/$1" ] || return 1
    show "$1"
    case " $was_active " in *" $1=$invocation "*) [ "$active" != active ] ;; esac
}

bring_unit_back() { # UNIT
    case " $was_active" in
        *" $1="*) ;;
        *) # it did not run before
            systemctl try-restart --no-block "$1"
            return 0 ;;
    esac
    if [ -n "${NO_WAIT-}" ]; then systemctl restart --no-block "$1"
    else bring_up_patiently "$1" || bad="$bad $reason;"; fi
    : >"$RUN/back/$1"
}

bring_up_patiently() { # UNIT: systemd cannot start anything while the disk is full to the last block, so wait
    _since=$(centiseconds)
    until bring_up "$FROM" "$1"; do
        [ "$result" = resources ] && [ "$(seconds_since "$_since" | cut -d. -f1)" -lt "$deadline_s" ] || return 1
        sleep 1
    done
}

settle() { # after txn, however it ended: nothing to do unless it was armed
    for _try in 1 2 3 4 5; do
        if [ ! -e "$ROOT/pending" ]; then
            tidy
            exit 0
        fi
        undo "rolled back"
        case $? in
            0)  if [ -z "$bad" ]; then emit result rolled-back "$(number "$FROM")" "$(number "$TO")"
                else emit result needs-person "$(number "$FROM")" "$(number "$TO")" "$bad"; fi ;;
            1) emit result changed "$(number "$TO")" "$(number "$FROM")" ;;
            *) sleep 1 ;;
        esac
    done
    emit result needs-person "$(number "$FROM")" "$(number "$TO")" " $reason; it is tried again every few seconds"
    exit 1 # labdeploy-recover takes over
}

recover() { # at boot before our units, and where settle did not end: until it succeeds, for systemd starts it again
    if [ -e "$ROOT/pending" ]; then
        NO_WAIT=--no-block # our units start after this one has ended: to wait for them would be to wait for oneself
        _why='rolled back'
        case $(systemctl is-system-running 2>/dev/null) in initializing | starting) _why="$_why at boot" ;; esac
        undo "$_why"
        [ $? -le 1 ] || exit 1
    fi
    tidy
}

# --- telling --------------------------------------------------------------------------------------------------

state() { # for status, history and rollback
    _g=$(generation current)
    emit current "$(number "$_g")"
    emit good "$(number "$(generation good)")"
    [ ! -L "$ROOT/previous" ] || emit previous "$(number "$(generation previous)")"
    [ ! -e "$ROOT/pending" ] || emit pending
    drift | while IFS= read -r _line; do emit drift "$_line"; done
    [ ! -e "$ROOT/gen/$_g/plan.json" ] || emit plan "$(tr -d '\n' <"$ROOT/gen/$_g/plan.json")"
    [ ! -e "$ROOT/gen/$_g/real" ] || while read -r _name _device _m _c _k; do
        if [ "$_device" = layers ]; then emit layers "$_name" "$_m"
        else emit real "$_name" "$_device" "$_m" "$_c" "$_k"; fi
    done <"$ROOT/gen/$_g/real"
    FROM=$_g
    for _u in $(units_of "$_g"); do
        _name=$(service_of "$_u")
        load_service "$ROOT/gen/$_g" "$_name"
        emit unit "$_name" "$unit"
        _healthy=false
        if [ -z "$ready" ]; then [ "$(systemctl is-active "$unit")" != active ] || _healthy=true
        elif http 5 "$ready" >/dev/null; then _healthy=true; fi
        emit healthy "$_name" "$_healthy"
        systemctl show -p ActiveState,SubState,NRestarts,MemoryCurrent,ActiveEnterTimestamp,NeedDaemonReload "$unit" |
            while IFS= read -r _line; do emit show "$_name" "${_line%%=*}" "${_line#*=}"; done
    done
}

history() {
    emit current "$(number "$(generation current)")"
    emit good "$(number "$(generation good)")"
    for _g in $(generations); do
        [ ! -e "$ROOT/gen/$_g/manifest.json" ] || emit manifest "$(number "$_g")" "$(tr -d '\n' <"$ROOT/gen/$_g/manifest.json")"
    done
    [ ! -e "$ROOT/journal.jsonl" ] || while IFS= read -r _line; do emit journal "$_line"; done <"$ROOT/journal.jsonl"
}

files() { # the current generation's files and what is installed, for diff
    _g=$(generation current)
    emit current "$(number "$_g")"
    for _u in $(units_of "$_g"); do
        emit deployed "systemd/$_u" "$(base64 -w 0 "$ROOT/gen/$_g/systemd/$_u")"
        [ ! -e "$UNITS/$_u" ] || emit installed "systemd/$_u" "$(base64 -w 0 "$UNITS/$_u")"
    done
    drift | while IFS= read -r _line; do emit drift "$_line"; done
}

confirm() { # ID: said by the controller over its second connection
    waiting "$1" && : >"$TXN/confirmed-$1" && emit confirmed "$1"
}

deny() { # ID WHY: the same, where another host of a span cannot go along
    waiting "$1" && printf '%s\n' "$2" >"$TXN/denied-$1.new" && mv "$TXN/denied-$1.new" "$TXN/denied-$1" && emit denied "$1"
}

waiting() { # ID
    case $(systemctl show -p Description "$TXN_UNIT") in
        *" $1 by "*) ;;
        *) refuse 1 "push $1 is not waiting here any more" ;;
    esac
}

program() { # prints this program: the text that was sent, the file that was opened, or the one that runs
    if [ -n "${PROGRAM-}" ]; then printf '%s\n' "$PROGRAM"; else cat "${PROGRAM_AT:-$0}"; fi
}

"$@"
