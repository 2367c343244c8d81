# The program that keeps models on a host, as root: POSIX sh, coreutils, findutils, awk and systemd.
#
#   list DIR SUMS       files below DIR, their sums where SUMS is `sums`, who uses them
#   look DIR            of the files on stdin (SIZE, tab, NAME): is it here, how much of it, who uses it
#   sum DIR NAME BYTES  the sha256 of a file's first BYTES, or of all of it: `-`
#   receive DIR NAME OFFSET            stdin goes to the end of the partial file, which must be OFFSET long
#   finish DIR NAME SIZE SHA256 MTIME FROM REPLACE   the partial file, if it is that one, becomes the file
#   verify DIR ACCEPT   reads each file that stdin names; ACCEPT is `accept` or `-`
#   remove DIR NAMES...  files or folders, unless something uses them
#   move DIR OLD NEW ...  pairs of files or folders, unless something uses them
#
# It answers in lines of tab-separated fields, as apply.sh does. What holds, at every moment:
#   a file has its name only when all of it is on the disk and its sha256 is right. Until then it is .NAME.labdeploy-part
#   beside it, which no runner takes for a model and which the next copy goes on with.
# A copy runs as a service whose name is made of the file's path: a lock that frees itself. `remove` and `move` run under the
# name of a push, labdeploy-txn, so that no push can begin to name what goes.

# shellcheck shell=sh disable=SC2015,SC2016
# (`a && b || c` is meant to run c where either fails; awk has its own $1)

set -u -f
umask 022 # models are for the users of services to read
export LC_ALL=C
TAB='	'
ROOT=/etc/labdeploy
UNITS=/etc/systemd/system
RECORDS=/var/lib/labdeploy/models # by the sha256 of a file's path: what it was when it came, and when it was last read
PART=labdeploy-part
STALL_S=30 # a copy that has done nothing for so long belongs to a connection that is gone
BEAT_S=5   # how often a long reading says how far it is

emit() { _ifs=$IFS; IFS=$TAB; printf '%s\n' "$*" 2>/dev/null; IFS=$_ifs; return 0; }
one_line() { tr '\n\t' '  ' | sed 's/  */ /g; s/^ //; s/ $//'; }
part_of() { printf '%s/.%s.%s' "$(dirname "$1")" "$(basename "$1")" "$PART"; }
size_of() { stat -Lc %s "$1" 2>/dev/null; }
state_of() { stat -Lc '%i %s %.9Y' "$1" 2>/dev/null; } # what is the same as long as nobody wrote to it

refuse() { # CODE WHAT HINT: nothing that was there has changed
    emit refused "$1" "$2" "${3-}"
    exit 20
}

# --- sums: read once, then known by inode, size and time --------------------------------------------------------

beat() { # NAME: how far the reading of file descriptor 4 is; and for other copies, that this one is at work
    while sleep "$BEAT_S" <&- >/dev/null 2>&1 3>&- 4<&-; do
        [ -z "${part-}" ] || touch -c "$part"
        emit reading "$1" "$(sed -n 's/^pos:[^0-9]*//p' /proc/self/fdinfo/4 2>/dev/null)"
    done
}

read_sum() { # PATH NAME [BYTES]: sets sum; empty where it cannot be read
    sum=''
    { exec 4<"$1"; } 2>/dev/null || return 1
    beat "$2" &
    _beat=$!
    case ${3--} in
        -) sum=$(sha256sum <&4) || sum='' ;;
        *) sum=$(head -c "$3" <&4 | sha256sum) || sum='' ;;
    esac
    kill "$_beat" 2>/dev/null
    wait "$_beat" 2>/dev/null
    exec 4<&-
    sum=${sum%% *}
    [ -n "$sum" ]
}

flush() { # PATH NAME: on a slow disk this takes a while too
    beat "$2" &
    _beat=$!
    sync "$1"
    _rc=$?
    kill "$_beat" 2>/dev/null
    wait "$_beat" 2>/dev/null
    return $_rc
}

from_disk() { dd if="$1" iflag=nocache count=0 status=none 2>/dev/null || :; } # so that what is read is not what is cached

record_file() { _id=$(printf '%s' "$1" | sha256sum) && printf '%s/%s' "$RECORDS" "${_id%% *}"; }

load_record() { # PATH: sets reference from at, and known and state of the last reading
    reference='' from='' at='' known='' state=''
    _file=$(record_file "$1")
    [ -e "$_file" ] || return 0
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            reference) reference=$_value ;; from) from=$_value ;; at) at=$_value ;;
            known) known=$_value ;; state) state=$_value ;;
        esac
    done <"$_file"
}

save_record() { # PATH, with reference from at known state; without it sums are read again, nothing worse
    _file=$(record_file "$1")
    mkdir -p "$RECORDS" 2>/dev/null && printf 'path=%s\nreference=%s\nfrom=%s\nat=%s\nknown=%s\nstate=%s\n' \
        "$1" "$reference" "$from" "$at" "$known" "$state" 2>/dev/null >"$_file.$$" && sync "$_file.$$" &&
        mv -T "$_file.$$" "$_file" || rm -f "$_file.$$" 2>/dev/null
}

note_sum() { # PATH SUM: what was read now; the first reading is what later ones are held against
    known=$2 state=$(state_of "$1")
    [ -n "$reference" ] || { reference=$2 from='' at=$(date -u +%Y-%m-%dT%H:%M:%SZ); }
    save_record "$1"
}

known_sum() { # PATH NAME: sets sum; reads the file only if it is not the one that was read last
    load_record "$1"
    sum=$known
    [ -n "$known" ] && [ "$state" = "$(state_of "$1")" ] || { read_sum "$1" "$2" && note_sum "$1" "$sum"; }
}

# --- who uses a file --------------------------------------------------------------------------------------------

# A path ends where no character of a name follows; a folder that is named stands for what is in it.
NAMED='
function names(text, path, more) {
    while (at = index(text, path)) {
        text = substr(text, at + length(path))
        if (text !~ ("^[A-Za-z0-9._+" more "-]")) return 1
    }
}
NR == FNR { list[++n] = $0; next }
index($0, ENVIRON["dir"] "/") {
    for (i = 1; i <= n; i++) {
        found = names($0, ENVIRON["dir"] "/" list[i], "")
        for (above = list[i]; !found && sub("/[^/]*$", "", above); ) found = names($0, ENVIRON["dir"] "/" above, "/")
        if (found) print list[i] "\t" FILENAME
    }
}'

named() { # prints NAME, tab, `generation N` or `unit U` for the names in $RUN/names
    {
        find "$ROOT/gen" -mindepth 2 -type f -exec awk "$NAMED" "$RUN/names" {} + 2>/dev/null |
            sed "s,$TAB$ROOT/gen/0*\([^/]*\)/.*,${TAB}generation$TAB\1,"
        find "$UNITS" -maxdepth 2 -type f -exec awk "$NAMED" "$RUN/names" {} + 2>/dev/null |
            sed "s,$TAB$UNITS/\([^/]*\).*,${TAB}unit$TAB\1,; s,\.d\$,,"
    } | sort -u
}

OPENED='
NR == FNR { name[$1] = $2; next }
$2 ~ /^\// { for (path = $2; path != ""; sub("/[^/]*$", "", path)) if (path in name) print name[path] "\t" $1 }'

opened() { # prints NAME, tab, `process COMMAND (PID)` for the names in $RUN/names
    while IFS= read -r _name; do
        printf '%s\t%s\n' "$(readlink -f "$dir/$_name")" "$_name"
    done <"$RUN/names" >"$RUN/real"
    {
        (set +f && grep -sHF ' /' /proc/[0-9]*/maps) | sed "s,^/proc/\([0-9]*\)/maps:[^/]*,\1$TAB,"
        (set +f && find /proc/[0-9]*/fd -mindepth 1 -printf '%h\t%l\n' 2>/dev/null) | sed 's,^/proc/,,; s,/fd,,'
    } | awk -F '\t' "$OPENED" "$RUN/real" - |
        sort -u | while IFS=$TAB read -r _name _pid; do
            printf '%s\tprocess\t%s (%s)\n' "$_name" "$(cat "/proc/$_pid/comm" 2>/dev/null)" "$_pid"
        done
}

emit_users() {
    [ -s "$RUN/names" ] || return 0
    { named && opened; } | while IFS= read -r _line; do printf 'used\t%s\n' "$_line"; done
}

users_in_words() { # `generation 7, generation 6, process llama-server (812)`; installed units are those of a generation
    { named && opened; } | cut -f2- | sort -u | tr '\t' ' ' | tr '\n' ',' | sed 's/,$//; s/,/, /g'
}

# --- what is here ---------------------------------------------------------------------------------------------

files() { # below $dir, by name; what Ollama's and Hugging Face's stores keep in blobs/ is theirs
    find -L "$dir" -mindepth 1 \( -name '.*' -o -path '*/blobs' -o -path '*/manifests' -o -name '*[[:cntrl:]]*' \) -prune \
        -o -type f -printf '%P\n' 2>/dev/null | sort
}

emit_room() {
    _there=$dir
    while [ ! -d "$_there" ]; do _there=$(dirname "$_there"); done
    emit room "$(df -Pk "$_there" | awk 'NR == 2 { print $4 }')"
    [ ! -d "$dir" ] || emit folder "$(readlink -f "$dir")"
}

list_models() { # SUMS
    emit_room
    [ -d "$dir" ] || return 0
    files >"$RUN/names"
    while IFS= read -r _name; do
        _path=$dir/$_name
        load_record "$_path"
        if [ "$1" = sums ]; then known_sum "$_path" "$_name"
        elif [ "$state" = "$(state_of "$_path")" ]; then sum=$known
        else sum=''; fi
        emit file "$_name" "$(size_of "$_path")" "$(stat -Lc %.9Y "$_path")" "$sum" "$reference" "$from" "$at"
    done <"$RUN/names"
    find -L "$dir" -name ".*.$PART" -type f -printf '%s\t%P\n' 2>/dev/null |
        while IFS=$TAB read -r _size _part; do emit part "${_part%."$PART"}" "$_size"; done
    emit_users
}

look_for() { # a file of another size is another file; one of the same size is read, unless its sum is known
    emit_room
    : >"$RUN/names"
    while IFS=$TAB read -r _size _name; do
        _path=$dir/$_name
        if [ -e "$_path" ]; then
            printf '%s\n' "$_name" >>"$RUN/names"
            sum=''
            [ "$(size_of "$_path")" != "$_size" ] || known_sum "$_path" "$_name"
            emit file "$_name" "$(size_of "$_path")" "$sum"
        fi
        _part=$(part_of "$_path")
        [ ! -e "$_part" ] || { _have=$(size_of "$_part") && read_sum "$_part" "$_name" "$_have" && emit part "$_name" "$_have" "$sum"; }
    done
    emit_users
}

print_sum() { # NAME BYTES
    [ -f "$dir/$1" ] || refuse 2 "$dir/$1 is not there" "labdeploy models ls {host}"
    if [ "$2" = - ] || [ "$2" = "$(size_of "$dir/$1")" ]; then known_sum "$dir/$1" "$1"; else read_sum "$dir/$1" "$1" "$2"; fi
    [ -n "$sum" ] || refuse 1 "$dir/$1 cannot be read"
    emit result "$sum"
}

# --- copying --------------------------------------------------------------------------------------------------

holder() { # UNIT: prints who runs it
    systemctl show -p Description --value "$1" 2>/dev/null
}

take_turn() { # UNIT PART: waits a moment for an earlier copy of this file; one that stands still is stopped
    _n=0
    while [ "$(systemctl show -p LoadState --value "$1")" = loaded ]; do
        if [ $((_n += 1)) -gt 30 ]; then
            _written=$(stat -c %Y "$2" 2>/dev/null) || _written=0
            [ $(($(date +%s) - _written)) -ge "$STALL_S" ] ||
                refuse 6 "another copy is writing it: $(holder "$1")" "try again when it has ended"
            systemctl stop "$1" 2>/dev/null
        fi
        sleep 0.1
    done
}

as_service() { # UNIT DESCRIPTION VERB ARGS...: a verb of this program as a service that outlives the connection
    _unit=$1 _about=$2 _run=/run/${1%.service}
    [ "$_unit" != labdeploy-txn.service ] || _run=/run/labdeploy-models # apply.sh has a folder of the other name
    shift 2
    _size=$(printf '%s\n' "$PROGRAM" | wc -c)
    exec 3>&1
    _said=$({ printf '%s\n' "$PROGRAM" && cat; } 2>/dev/null | systemd-run --quiet --collect --pipe --wait \
        --service-type=exec --unit="$_unit" --description="$_about" \
        -p RuntimeDirectory="${_run#/run/}" -p RuntimeDirectoryMode=0700 \
        /bin/sh -c "head -c $_size >$_run/program && . $_run/program" "$_run/program" "$@" 2>&1 >&3 3>&-)
    _rc=$?
    case $_said in
        *"already loaded"* | *"already exists"*)
            refuse 6 "another command holds it: $(holder "$_unit")" "try again when it has ended" ;;
    esac
    [ $_rc -eq 0 ] || [ -z "$_said" ] || emit stderr "$(printf '%s' "$_said" | one_line)"
    emit ended $_rc
    exit $_rc
}

copy_as_service() { # VERB DIR NAME ...
    _unit=labdeploy-copy-$(printf '%s' "$2/$3" | sha256sum | head -c 16).service
    take_turn "$_unit" "$(part_of "$2/$3")"
    as_service "$_unit" "labdeploy models push: $2/$3" "$@"
}

append() { # NAME OFFSET; an OFFSET of 0 begins anew
    _path=$dir/$1
    part=$(part_of "$_path")
    mkdir -p "$(dirname "$_path")" || refuse 1 "cannot write below $dir"
    [ "$2" != 0 ] || : >"$part" || refuse 1 "cannot write below $dir"
    _have=$(size_of "$part")
    [ "$_have" = "$2" ] || refuse 6 "the copy has ${_have:-no} bytes of $1 now, not $2" "try again"
    _said=$(cat 2>&1 >>"$part") || refuse 1 "cannot write $part: $(printf '%s' "${_said##*: }" | one_line)" \
        "make room; the same command then goes on where it stopped"
    emit result "$(size_of "$part")"
}

finish_file() { # NAME SIZE SHA256 MTIME FROM REPLACE
    _name=$1 _path=$dir/$1
    part=$(part_of "$_path")
    _have=$(size_of "$part")
    [ "$_have" = "$2" ] || refuse 6 "the copy has ${_have:-no} bytes of $_name, not $2" "try again"
    emit step verifying "$_name" "$2"
    flush "$part" "$_name" && from_disk "$part" && read_sum "$part" "$_name" || refuse 1 "cannot read back $part"
    [ "$sum" = "$3" ] || { rm -f "$part" && refuse 1 "$_name has the sha256 $sum here and $3 where it comes from" \
        "try again; if that does not help, look at the disks and the memory of both machines"; }
    replaceable "$_name" "$6"
    chmod 644 "$part" && touch -d "@$4" "$part" && sync "$part" && mv -T "$part" "$_path" &&
        sync "$(dirname "$_path")" || refuse 1 "cannot write $_path"
    reference=$sum from=$5 at=$(date -u +%Y-%m-%dT%H:%M:%SZ)
    note_sum "$_path" "$sum"
    ! command -v setpriv >/dev/null || setpriv --reuid 65534 --regid 65534 --clear-groups test -r "$_path" ||
        emit warning "$_path is not readable for the users of services: chmod a+rX on the folders above it"
    emit result copied
}

replaceable() { # NAME REPLACE: another file of that name may go
    [ -e "$dir/$1" ] || return 0
    [ "$2" = replace ] || refuse 6 "$dir/$1 has appeared meanwhile" "try again"
    printf '%s\n' "$1" >"$RUN/names"
    _users=$(users_in_words)
    [ -z "$_users" ] || refuse 2 "$dir/$1 is in use by $_users" "labdeploy models push {host} FILE --as OTHER-NAME"
}

# --- checking, removing, renaming -------------------------------------------------------------------------------

verify_files() { # ACCEPT
    while IFS= read -r _name; do
        _path=$dir/$_name
        if [ ! -e "$_path" ]; then emit verified "$_name" missing; continue; fi
        load_record "$_path"
        [ "$1" != accept ] || reference=''
        _was=$reference
        from_disk "$_path"
        if read_sum "$_path" "$_name"; then note_sum "$_path" "$sum"; fi
        emit verified "$_name" read "$(size_of "$_path")" "$sum" "$_was"
    done
    emit result verified
}

free_of_pushes() { # or refuses
    case $(systemctl show -p ActiveState --value labdeploy-txn.service) in
        active | activating | deactivating)
            refuse 6 "a push holds it: $(holder labdeploy-txn.service)" "wait for it to end, then try again" ;;
    esac
    [ ! -e "$ROOT/pending" ] || refuse 6 "an earlier push was cut off and is being undone" "try again in a moment"
}

unused() { # NAMES
    for _name; do
        [ -e "$dir/$_name" ] || [ -e "$(part_of "$dir/$_name")" ] ||
            refuse 2 "$dir/$_name is not there" "labdeploy models ls {host}"
        printf '%s\n' "$_name"
    done >"$RUN/names"
    _users=$(users_in_words)
    [ -z "$_users" ] || refuse 2 "$dir/$1 is in use by $_users" \
        "push without it; it can go when no kept generation names it: labdeploy history {host}"
}

remove_models() { # NAMES
    unused "$@"
    for _name; do
        rm -f "$(record_file "$dir/$_name")"
        rm -rf "${dir:?}/$_name" "$(part_of "$dir/$_name")" || refuse 1 "cannot remove $dir/$_name"
        sync "$(dirname "$dir/$_name")"
        (cd "$dir" && rmdir -p "$(dirname "$_name")" 2>/dev/null)
    done
    emit result removed
}

move_records() { # OLD NEW: of a file, or of all files of a folder
    find "$dir/$2" -type f -printf '/%P\n' | while IFS= read -r _below; do
        load_record "$dir/$1${_below%/}"
        [ -z "$reference" ] || save_record "$dir/$2${_below%/}"
        rm -f "$(record_file "$dir/$1${_below%/}")"
    done
}

move_models() { # OLD NEW [OLD NEW]...: the last pair is what a runner finds the model by
    _pairs=$#
    while [ $_pairs -gt 0 ]; do # the list goes round once, so that each pair is checked before the first is renamed
        unused "$1"
        [ ! -e "$dir/$2" ] || refuse 2 "$dir/$2 is there already" "labdeploy models ls {host}"
        set -- "$@" "$1" "$2"
        shift 2
        _pairs=$((_pairs - 2))
    done
    while [ $# -gt 0 ]; do
        mkdir -p "$(dirname "$dir/$2")" && mv -T "$dir/$1" "$dir/$2" && sync "$(dirname "$dir/$2")" ||
            refuse 1 "cannot rename $dir/$1"
        move_records "$1" "$2"
        (cd "$dir" && rmdir -p "$(dirname "$1")" 2>/dev/null)
        shift 2
    done
    emit result moved
}

# --- verbs ----------------------------------------------------------------------------------------------------

in_folder() { # DIR: sets dir, and RUN, a folder for what is kept in between
    dir=$1
    export dir
    case $0 in
        /run/labdeploy-*) RUN=${0%/*} ;; # of the service that runs this program; systemd makes and removes it
        *)
            RUN=$(mktemp -d /run/labdeploy-models.XXXXXX) || refuse 1 "cannot write in /run"
            trap 'rm -rf "$RUN"' EXIT ;;
    esac
}

list() { in_folder "$1" && list_models "$2"; }
look() { in_folder "$1" && look_for; }
sum() { in_folder "$1" && print_sum "$2" "$3"; }
verify() { in_folder "$1" && verify_files "$2"; }
receive() { copy_as_service receive_now "$@"; }
receive_now() { in_folder "$1" && shift && append "$@"; }
finish() { copy_as_service finish_now "$@"; }
finish_now() { in_folder "$1" && shift && finish_file "$@"; }
remove() { free_of_pushes && as_service labdeploy-txn.service "labdeploy models rm" remove_now "$@"; }
remove_now() { in_folder "$1" && shift && remove_models "$@"; }
move() { free_of_pushes && as_service labdeploy-txn.service "labdeploy models mv" move_now "$@"; }
move_now() { in_folder "$1" && shift && move_models "$@"; }

PROGRAM=${PROGRAM-}
"$@"
