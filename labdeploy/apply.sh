# The program that runs on a host, as root: POSIX sh, coreutils, tar, curl and systemd; nothing else.
#
#   push ID HASH BY WATCH_S CONFIRM_S OPTIONS   compare; unless nothing changed, run `txn` with the bundle on stdin
#   rollback ID GENERATION BY WATCH_S CONFIRM_S OPTIONS   the same with a generation that is already here
#                               OPTIONS: `-`, or of `overwrite-drift` and `dry-run` joined by commas
#   txn ...                     the transaction; runs as the transient service labdeploy-txn, whose name is the lock
#   settle                      after txn, however it ended: unless it was confirmed, the old generation comes back
#   recover                     the same at boot, before our units start
#   state | history | files N   what is here, for status, history and diff
#
# It answers in lines of tab-separated fields; host.py reads them. What holds, at every moment:
#   current  -> the generation whose files are installed       good -> the last one that was confirmed
#   pending  exists from before the first installed file changes until the switch is confirmed or undone
# so that whoever finds `pending` (settle, recover, the next push) knows what to put back, and from where: undo/.
# Every file is made durable (sync FILE is an fsync) before anything relies on it. The moment of decision is the
# rename of `good`: before it, every way out leads back to the old generation; after it, to the new one.

# shellcheck shell=sh disable=SC2015,SC2010,SC2012,SC2045,SC2046,SC2086
# (names of generations, units and services are of [A-Za-z0-9._-] alone, checked before they are sent, so lists of
# them are split at spaces on purpose; `a && b || c` is meant to run c where either fails)

set -u -f
umask 022
export LC_ALL=C
TAB='	'
ROOT=/etc/labdeploy
UNITS=/etc/systemd/system
RUN=/run/labdeploy
TXN_UNIT=labdeploy-txn.service
EMPTY=000000     # the generation before the first push
KEEP=10          # generations kept beside current, good and previous
SPACE_KIB=2048   # free in /etc: many times what a generation takes
RUN_KIB=16384    # systemd refuses daemon-reload below 16 MiB free in /run (measured on 257)

emit() { _ifs=$IFS; IFS=$TAB; printf '%s\n' "$*" 2>/dev/null; IFS=$_ifs; return 0; }
one_line() { tr '\n\t' '  ' | sed 's/  */ /g; s/^ //; s/ $//'; }
generation() { _to=$(readlink "$ROOT/$1" 2>/dev/null) && printf '%s' "${_to#gen/}" || printf '%s' "$EMPTY"; }
number() { _n=${1#"${1%%[!0]*}"}; printf '%s' "${_n:-0}"; }
units_of() { [ ! -d "$ROOT/gen/$1/systemd" ] || ls "$ROOT/gen/$1/systemd"; }
services_of() { [ ! -d "$ROOT/gen/$1/services" ] || ls "$ROOT/gen/$1/services"; }
generations() { ls "$ROOT/gen" 2>/dev/null | grep -x '[0-9]\{6\}'; }
centiseconds() { read -r _up _ </proc/uptime; printf '%s' "${_up%.*}${_up#*.}"; }
seconds_since() { _d=$(($(centiseconds) - $1)); printf '%d.%02d' $((_d / 100)) $((_d % 100)); }

refuse() { # CODE WHAT HINT: nothing was changed
    emit refused "$1" "$2" "${3-}"
    exit 20
}

journal() { # EVENT FROM TO RESULT
    printf '{"at":"%s","event":"%s","push_id":"%s","by":"%s","from":%s,"to":%s,"changed":[%s],"result":"%s"}\n' \
        "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$ID" "$BY" "$(number "$2")" "$(number "$3")" "$(names_json)" "$4" \
        >>"$ROOT/journal.jsonl"
    sync "$ROOT/journal.jsonl"
}

names_json() { # the services that changed, as the inside of a JSON list
    for _u in $added $changed $removed $start; do printf '%s\n' "$(service_of "$_u")"; done | sort -u |
        sed 's/.*/"&"/' | tr '\n' ',' | sed 's/,$//'
}

# --- facts of one service: read as data, never run ------------------------------------------------------------

load_service() { # FOLDER OF A GENERATION, NAME
    unit='' ready='' completions='' models='' body='' n_ctx='' deadline_s=60
    binary='' model='' model_bytes=0 api_key_file=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            unit) unit=$_value ;; ready) ready=$_value ;; completions) completions=$_value ;;
            models) models=$_value ;; body) body=$_value ;; n_ctx) n_ctx=$_value ;;
            deadline_s) deadline_s=$_value ;; binary) binary=$_value ;; model) model=$_value ;; model_bytes) model_bytes=$_value ;;
            api_key_file) api_key_file=$_value ;;
        esac
    done <"$1/services/$2"
}

show() { # UNIT: sets active sub restarts invocation result status
    active='' sub='' restarts=0 invocation='' result='' status=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            ActiveState) active=$_value ;; SubState) sub=$_value ;; NRestarts) restarts=${_value:-0} ;;
            InvocationID) invocation=$_value ;; Result) result=$_value ;; ExecMainStatus) status=$_value ;;
        esac
    done <<EOF
$(systemctl show -p ActiveState,SubState,NRestarts,InvocationID,Result,ExecMainStatus "$1" 2>/dev/null)
EOF
}

# --- comparing ------------------------------------------------------------------------------------------------

directives() { sed '/^[#;]/d; /^[[:space:]]*$/d' "$1"; }

compare_units() { # OLD NEW, two folders: sets added removed changed touched same, as lists of units
    added='' removed='' changed='' touched='' same=''
    for _u in $(ls "$2/systemd"); do
        _old=$1/systemd/$_u _new=$2/systemd/$_u
        if [ ! -e "$_old" ]; then added="$added $_u"
        elif cmp -s "$_old" "$_new"; then same="$same $_u"
        elif [ "$(directives "$_old")" = "$(directives "$_new")" ]; then touched="$touched $_u"
        else changed="$changed $_u"; fi
    done
    for _u in $(ls "$1/systemd" 2>/dev/null); do
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
            refuse 6 "another push holds it: $_who" "wait for it to end; it frees the host itself, whatever happens to it" ;;
    esac
}

# --- push and rollback: compare first, write nothing where nothing changes --------------------------------------

option() { case ",$OPTIONS," in *",$1,"*) return 0 ;; esac; return 1; }

refuse_drift() {
    _found=$(drift | one_line)
    [ -z "$_found" ] || option overwrite-drift || option dry-run ||
        refuse 2 "changed on the host by hand: $_found" "labdeploy diff shows it; push --overwrite-drift replaces it"
}

push() { # ID HASH BY WATCH_S CONFIRM_S OPTIONS; the bundle may follow on stdin
    ID=$1 HASH=$2 BY=$3 OPTIONS=$6
    locked
    _g=$(generation current)
    if [ -e "$ROOT/gen/$_g/SHA256SUMS" ] && [ ! -e "$ROOT/pending" ]; then
        _hash=$(sha256sum <"$ROOT/gen/$_g/SHA256SUMS")
        if [ "${_hash%% *}" = "$HASH" ] && [ -z "$(drift)" ] &&
            ! unit_states "$_g" | grep -qv ' active enabled$'; then
            emit result unchanged "$(number "$_g")"
            exit 0
        fi
    fi
    refuse_drift
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
        refuse 2 "generation $(number "$_to") is not kept here" "labdeploy history  (lists the generations that are)"
    if [ "$_to" = "$_g" ] && [ ! -e "$ROOT/pending" ] && [ -z "$(drift)" ]; then
        emit result unchanged "$(number "$_g")"
        exit 0
    fi
    refuse_drift
    run_txn rollback "$1" "$_to" "$3" "$4" "$5" "$6"
}

run_txn() { # VERB ID TARGET BY WATCH_S CONFIRM_S OPTIONS: the transaction as a service that outlives this connection
    command -v curl >/dev/null || refuse 2 "curl is not installed here" "apt-get install curl  (or your system's like)"
    TXN=$RUN/txn-$ID
    (umask 077 && mkdir -p "$RUN" && mkdir "$TXN") || refuse 1 "cannot write $RUN"
    printf '%s\n' "$PROGRAM" 2>/dev/null >"$TXN/program" || refuse 1 "cannot write $RUN: is it full?"
    systemd-run --quiet --collect --pipe --wait --service-type=exec --unit="$TXN_UNIT" \
        --description="$1 $2 by $4" -p RuntimeMaxSec=7200 -p TimeoutStopSec=3600 \
        -p ExecStopPost="/bin/sh $TXN/program settle" \
        /bin/sh "$TXN/program" txn "$@" 2>"$TXN.err"
    _rc=$?
    _said=$(one_line <"$TXN.err")
    rm -rf "$TXN.err" "$TXN"
    case $_said in *"already loaded"* | *"already exists"*) locked ;; esac
    [ $_rc -eq 0 ] || [ -z "$_said" ] || emit stderr "$_said"
    exit $_rc
}

# --- the transaction ------------------------------------------------------------------------------------------

txn() { # VERB ID TARGET BY WATCH_S CONFIRM_S OPTIONS
    TXN=${0%/program}
    [ ! -e "$ROOT/pending" ] || undo "an earlier push was cut off"
    VERB=$1 ID=$2 BY=$4 WATCH_S=$5 CONFIRM_S=$6 OPTIONS=$7
    FROM=$(generation current)
    case $VERB in
        push) receive "$3" ;;
        rollback) TO=$3 NEW=$ROOT/gen/$3 ;;
    esac
    decide
    preflight
    ! option dry-run || would
    stage
    arm
    switch
    restart_changed
    watch
    confirmed
    commit
}

decide() { # what would change, and what the plan was before, for the one who reads the recap
    compare_units "$ROOT/gen/$FROM" "$NEW"
    start=$(not_running "$same $touched")
    ! option overwrite-drift || overwrite "$(drifted_units)"
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

would() { # dry run: what push would do; nothing is written
    for _u in $added; do emit service "$(service_of "$_u")" started; done
    for _u in $changed; do emit service "$(service_of "$_u")" restarted; done
    for _u in $start; do emit service "$(service_of "$_u")" started; done
    for _u in $removed; do emit service "$(service_of "$_u")" stopped; done
    drift | while IFS= read -r _line; do emit drift "$_line"; done
    emit result would-change "$(number "$TO")" "$(number "$FROM")"
    exit 0
}

receive() { # HASH: unpack the bundle into /run and see that it is what was sent
    emit step receive
    mkdir "$TXN/new" && tar -xf - -C "$TXN/new" || refuse 1 "the bundle did not arrive whole"
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
    _touch=$UNITS/.labdeploy-$$
    (: >"$_touch") 2>/dev/null && rm -f "$_touch" || refuse 1 "$UNITS cannot be written: is it mounted read-only?"
    for _s in $(ls "$NEW/services"); do
        preflight_service "$_s"
    done
    for _u in $(ls "$NEW/systemd"); do
        if [ ! -e "$ROOT/gen/$FROM/systemd/$_u" ] && [ -e "$UNITS/$_u" ]; then
            refuse 2 "$_u exists and was not made by labdeploy" "rename the service, or move $UNITS/$_u away"
        fi
        _said=$(SYSTEMD_LOG_LEVEL=warning systemd-analyze verify --man=no --recursive-errors=no "$NEW/systemd/$_u" 2>&1 |
            grep -F "$_u" | one_line)
        [ -z "$_said" ] || refuse 2 "systemd does not accept $_u: $_said" "labdeploy render --stdout  (look at that unit)"
    done
}

room() { # FOLDER KIB
    _free=$(df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print $4 }')
    [ "${_free:-0}" -ge "$2" ] ||
        refuse 1 "only ${_free:-0} KiB are free in $1, $2 are needed" "make room there; nothing was changed"
}

preflight_service() { # NAME: program, model and key are there, and the service's user can read the model
    load_service "$NEW" "$1"
    [ -x "$binary" ] || refuse 2 "$1: $binary is not there" "install it, or say where it is: runners: {...: PATH}"
    [ -n "$model" ] || return 0
    [ -e "$model" ] || refuse 2 "$1: model file $model is not there" "scp MODEL $(uname -n):$model"
    if [ -f "$model" ]; then
        _size=$(stat -Lc %s "$model")
        case $model in
            *-of-[0-9][0-9][0-9][0-9][0-9].gguf) ;; # a split model: the plan counts all parts
            *) [ "$_size" = "$model_bytes" ] || [ "$model_bytes" = 0 ] ||
                refuse 2 "$1: $model has $_size bytes, the plan is for $model_bytes" "copy it again, or inspect it again" ;;
        esac
    fi
    ! command -v setpriv >/dev/null || setpriv --reuid 65534 --regid 65534 --clear-groups test -r "$model" ||
        refuse 2 "$1: $model is not readable for the service's own user" "chmod a+rX on it and the folders above it"
    [ -z "$api_key_file" ] || [ -s "$api_key_file" ] || refuse 2 "$1: API key file $api_key_file is missing or empty"
}

stage() { # the new generation, durable under its number before anything refers to it
    emit step stage "$(number "$TO")"
    [ "$VERB" = push ] && [ "$TO" != "$FROM" ] || return 0
    mkdir -p "$ROOT/gen/$EMPTY/systemd" "$ROOT/gen/$EMPTY/services" "$ROOT/bin" || refuse 1 "cannot write $ROOT"
    [ -e "$ROOT/gen/$EMPTY/SHA256SUMS" ] || : >"$ROOT/gen/$EMPTY/SHA256SUMS"
    rm -rf "$ROOT/gen/new"
    if ! cp -R "$NEW" "$ROOT/gen/new" 2>/dev/null || ! durable "$ROOT/gen/new"; then
        rm -rf "$ROOT/gen/new"
        refuse 1 "the new generation does not fit in $ROOT/gen" "make room there; nothing was changed"
    fi
    mv -T "$ROOT/gen/new" "$ROOT/gen/$TO" && sync "$ROOT/gen" "$ROOT" || refuse 1 "cannot write $ROOT/gen"
    install_program
}

durable() { # DIR: fsync every file below it, then every folder
    find "$1" -type f -exec sync {} + && find "$1" -type d -exec sync {} +
}

install_program() { # this program and the unit that runs it at boot
    put "$ROOT/bin/labdeploy-host" <<EOF || refuse 1 "cannot write $ROOT/bin"
$PROGRAM
EOF
    put "$UNITS/labdeploy-recover.service" <<EOF || refuse 1 "cannot write $UNITS"
[Unit]
Description=Undo a labdeploy push that was cut off before it was confirmed
ConditionPathExists=$ROOT/pending
DefaultDependencies=no
After=local-fs.target
Conflicts=shutdown.target
Before=shutdown.target

[Service]
Type=oneshot
ExecStart=/bin/sh $ROOT/bin/labdeploy-host recover

[Install]
WantedBy=multi-user.target
EOF
    [ -L "$UNITS/multi-user.target.wants/labdeploy-recover.service" ] ||
        systemctl enable --quiet --no-reload labdeploy-recover.service 2>/dev/null
}

put() { # FILE, content on stdin: written beside it, made durable, renamed; untouched where it is the same
    cat >"$1.new" && sync "$1.new" || { rm -f "$1.new"; return 1; }
    if cmp -s "$1" "$1.new"; then rm -f "$1.new"; return 0; fi
    mv -T "$1.new" "$1" && sync "${1%/*}"
}

not_running() { # UNITS: prints those that are not active
    for _u in $1; do
        [ "$(systemctl is-active "$_u")" = active ] || printf ' %s' "$_u"
    done
}

drifted_units() { drift | sed -n 's/^\(changed\|missing\) / /p' | tr -d '\n'; }

arm() { # all that is needed to go either way, durable, before the first installed file changes
    emit step arm
    rm -rf "$ROOT/undo" "$ROOT/incoming"
    mkdir "$ROOT/undo" "$ROOT/incoming" || refuse 1 "cannot write $ROOT"
    for _u in $added $changed $touched; do
        cp "$ROOT/gen/$TO/systemd/$_u" "$ROOT/incoming/$_u" || unarm
    done
    for _u in $changed $touched $removed; do
        [ ! -e "$UNITS/$_u" ] || cp -p "$UNITS/$_u" "$ROOT/undo/$_u" || unarm
    done
    was_active=''
    for _u in $changed $removed; do
        show "$_u"
        [ "$active" != active ] || was_active="$was_active $_u=$invocation"
    done
    durable "$ROOT/undo" && durable "$ROOT/incoming" || unarm
    put "$ROOT/pending" <<EOF || unarm
id=$ID
by=$BY
verb=$VERB
from=$FROM
to=$TO
added=$added
changed=$changed
touched=$touched
removed=$removed
start=$start
was_active=$was_active
EOF
}

unarm() {
    rm -rf "$ROOT/undo" "$ROOT/incoming" "$ROOT/pending.new"
    [ "$VERB" = rollback ] || [ "$TO" = "$FROM" ] || rm -rf "$ROOT/gen/$TO"
    refuse 1 "no room in $ROOT for what an undo needs" "make room there; nothing was changed"
}

fail() { # WHAT: from here on the way out is settle, which puts the old generation back
    emit failed "$1"
    exit 21
}

point() { # LINK GENERATION: swap a symlink in one rename
    ln -sfn "gen/$2" "$ROOT/$1.new" && mv -T "$ROOT/$1.new" "$ROOT/$1" && sync "$ROOT"
}

switch() { # install the new files, then let systemd read them
    emit step switch "$(number "$TO")"
    for _u in $added $changed $touched; do
        mv -T "$ROOT/incoming/$_u" "$UNITS/$_u" || fail "cannot install $_u"
    done
    for _u in $removed; do
        systemctl disable --quiet --no-reload "$_u" 2>/dev/null
        rm -f "$UNITS/$_u"
    done
    enable_units "$added $changed $touched $same"
    sync "$UNITS"
    point current "$TO" || fail "cannot switch $ROOT/current"
    reload "$added $changed $touched"
}

enable_units() { # UNITS
    [ -z "$(printf '%s' "$1" | tr -d ' ')" ] || systemctl enable --quiet --no-reload $1 2>/dev/null ||
        fail "cannot enable $1"
    [ ! -d "$UNITS/multi-user.target.wants" ] || sync "$UNITS/multi-user.target.wants"
}

reload() { # UNITS: daemon-reload says 0 even where a unit is garbage, so each is asked for
    _said=$(systemctl daemon-reload 2>&1) || fail "daemon-reload: $(printf '%s' "$_said" | one_line)"
    for _u in $1; do
        [ "$(systemctl show -p LoadState --value "$_u")" = loaded ] || fail "systemd did not load $_u"
    done
}

service_of() { # UNIT: its service name
    _s=${1#labdeploy-}
    printf '%s' "${_s%.service}"
}

restart_changed() { # stop what is gone, then restart what changed, one after another in the order units ask for
    for _u in $removed; do
        systemctl stop "$_u" 2>/dev/null
        systemctl reset-failed "$_u" 2>/dev/null
        emit service "$(service_of "$_u")" stopped
    done
    for _u in $changed $added $start; do
        bring_up "$TO" "$_u" || fail "$reason"
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
    systemctl restart --no-block "$unit"
    wait_active "$_before" "$((_t0 + deadline_s * 100))" || return 1
    _down=$(seconds_since "$_t0")
    emit step probe "$_name"
    serves || return 1
    emit service "$_name" "$_action" "$_down"
}

wait_active() { # OLD_INVOCATION DEADLINE: until the new process says it is ready (ExecStartPost polls it)
    while :; do
        show "$unit"
        if [ "$invocation" != "$1" ] || [ -z "$1" ]; then
            [ "$active" != active ] || return 0
            case $active$sub in
                failed* | activatingauto-restart* | inactive*)
                    reason="$_name: ended while it started: $result, exit status $status"
                    last_words
                    return 1 ;;
            esac
        fi
        if [ "$(centiseconds)" -gt "$2" ]; then
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

http() { # TIMEOUT_S URL [BODY]: the answer on stdout; the API key never stands in a command line
    if [ -n "$api_key_file" ]; then
        printf 'header = "Authorization: Bearer %s"\n' "$(head -n 1 "$api_key_file")"
    fi | curl -sS -f -m "$1" -K - -H 'Content-Type: application/json' ${3:+--data "$3"} "$2" 2>&1
}

serves() { # ready, one token, and the context that was planned
    _said=$(http 10 "$ready") || { unhealthy "$ready" "$_said"; return 1; }
    _said=$(http "$deadline_s" "$completions" "$body") || { unhealthy "one-token completion" "$_said"; return 1; }
    [ -n "$n_ctx" ] || return 0
    _ctx=$(http 10 "$models" | tr ',{}' '\n\n\n' | sed -n 's/^ *"n_ctx": *\([0-9]*\).*/\1/p' | head -n 1)
    [ -z "$_ctx" ] || [ "$_ctx" = "$n_ctx" ] || { unhealthy context "serves $_ctx tokens, $n_ctx were planned"; return 1; }
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
        for _u in "$@"; do
            show "$_u"
            if [ "$active" != active ] || [ "$restarts" -gt 0 ]; then
                unit=$_u _name=$(service_of "$_u")
                last_words
                fail "$_name: was ready, then stopped: $active, $sub, $result, $restarts restarts"
            fi
        done
        sleep 0.5
    done
}

confirmed() { # the controller reaches this host over a new connection, or the old generation comes back
    emit confirm "$ID"
    _until=$(($(centiseconds) + CONFIRM_S * 100))
    until [ -e "$TXN/confirmed" ]; do
        [ "$(centiseconds)" -lt "$_until" ] || fail "nobody confirmed within $CONFIRM_S s"
        sleep 0.05
    done
}

commit() { # the rename of `good` decides
    [ "$FROM" = "$TO" ] || point previous "$FROM" || fail "cannot write $ROOT"
    point good "$TO" || fail "cannot write $ROOT"
    rm -f "$ROOT/pending"
    sync "$ROOT"
    journal "$VERB" "$FROM" "$TO" ok
    rm -rf "$ROOT/undo" "$ROOT/incoming"
    prune
    emit result changed "$(number "$TO")" "$(number "$FROM")"
}

prune() { # the oldest generations beyond KEEP, but never one that runs or that a rollback needs
    generations | head -n -"$KEEP" | while IFS= read -r _g; do
        case $_g in
            "$EMPTY" | "$(generation current)" | "$(generation good)" | "$(generation previous)") ;;
            *) rm -rf "$ROOT/gen/$_g" ;;
        esac
    done
}

# --- going back -----------------------------------------------------------------------------------------------

load_pending() {
    ID='' BY='' VERB=push FROM=$EMPTY TO=$EMPTY added='' changed='' touched='' removed='' start='' was_active=''
    while IFS= read -r _line; do
        _value=${_line#*=}
        case ${_line%%=*} in
            id) ID=$_value ;; by) BY=$_value ;; verb) VERB=$_value ;; from) FROM=$_value ;; to) TO=$_value ;;
            added) added=$_value ;; changed) changed=$_value ;; touched) touched=$_value ;;
            removed) removed=$_value ;; start) start=$_value ;; was_active) was_active=$_value ;;
        esac
    done <"$ROOT/pending"
}

restore() { # the installed files as they were; renames and removals only, so that a full disk cannot stop it
    for _u in $added; do
        systemctl disable --quiet --no-reload "$_u" 2>/dev/null
        rm -f "$UNITS/$_u"
    done
    for _u in $changed $touched $removed; do
        [ ! -e "$ROOT/undo/$_u" ] || mv -T "$ROOT/undo/$_u" "$UNITS/$_u"
    done
    for _u in $removed; do
        systemctl enable --quiet --no-reload "$_u" 2>/dev/null
    done
    sync "$UNITS"
    point current "$FROM"
}

settle_files() { # WHY: finish or undo what `pending` says, files only
    load_pending
    if [ "$(generation good)" = "$TO" ] && [ "$TO" != "$FROM" ]; then
        rm -f "$ROOT/pending"
        sync "$ROOT"
        return 1
    fi
    restore
    systemctl daemon-reload
    rm -f "$ROOT/pending"
    sync "$ROOT"
    journal settle "$TO" "$FROM" "$1"
    rm -rf "$ROOT/undo" "$ROOT/incoming"
}

undo() { # WHY: the old generation, files and processes; sets `bad` to what could not be brought back
    bad=''
    settle_files "$1" || return 1
    emit step back "$(number "$FROM")"
    for _u in $added; do
        systemctl stop "$_u" 2>/dev/null
        systemctl reset-failed "$_u" 2>/dev/null
    done
    for _was in $was_active; do
        show "${_was%=*}"
        [ "$active" = active ] && [ "$invocation" = "${_was#*=}" ] && continue # never touched: it goes on serving
        bring_up "$FROM" "${_was%=*}" || bad="$bad $reason;"
    done
}

settle() { # after txn, however it ended: nothing to do unless it was armed and not confirmed
    if [ -e "$ROOT/pending" ] && undo "rolled back"; then
        if [ -z "$bad" ]; then emit result rolled-back "$(number "$FROM")" "$(number "$TO")"
        else emit result needs-person "$(number "$FROM")" "$(number "$TO")" "$bad"; fi
    fi
    rm -rf "${0%/program}"
}

recover() { # at boot, before our units: systemd starts what is queued with the definitions that are now back
    [ -e "$ROOT/pending" ] || exit 0
    settle_files "rolled back at boot"
    for _u in $added; do
        systemctl stop --no-block "$_u" 2>/dev/null
    done
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
    for _name in $(services_of "$_g"); do
        load_service "$ROOT/gen/$_g" "$_name"
        emit unit "$_name" "$unit"
        _healthy=false
        ! http 5 "$ready" >/dev/null || _healthy=true
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
    _state=$(systemctl show -p Description "$TXN_UNIT")
    case $_state in
        *" $1 by "*) : >"$RUN/txn-$1/confirmed" && emit confirmed "$1" ;;
        *) refuse 1 "push $1 is not waiting here any more" ;;
    esac
}

PROGRAM=${PROGRAM-$(cat "$0")}
"$@"
