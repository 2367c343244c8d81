# All of a push that finds nothing to do, which is most of them: one hash of everything and one question to systemd; the
# rest is builtins. It comes with the command, ahead of the program that the host keeps: to hash and read that one takes
# longer than all of this, and some ask many hosts that are one machine. No single quotes, for it is quoted twice.
#
# The question goes over the system bus: it takes 3 ms of processor time, `systemctl is-active` or `list-units` 5 (to root it
# opens a connection of its own to systemd), and `show` 10, for systemd collects all properties of each unit, whichever are
# asked for (two units, systemd 262).

# shellcheck shell=sh disable=SC2015,SC2034,SC2086
# (names of units are of [A-Za-z0-9._-] alone, so lists of them are split at spaces on purpose; FROM is for others)

ROOT=/etc/labdeploy
UNITS=/etc/systemd/system
TXN_UNIT=labdeploy-txn.service # its name is the lock

nothing_to_do() { # HASH: sets FROM; what is installed is HASH, unchanged by hand, active and enabled, and nobody is at it
    [ ! -e "$ROOT/pending" ] && cd -P "$ROOT/current" 2>/dev/null || return 1
    FROM=${PWD##*/}
    cd /
    [ -e "$ROOT/gen/$FROM/SHA256SUMS" ] || return 1
    _sums="$1 " _units=""
    set -- "$ROOT/gen/$FROM/SHA256SUMS"
    while read -r _sum _file; do
        case $_file in systemd/*) ;; *) continue ;; esac
        _u=${_file#*/}
        [ ! -d "$UNITS/$_u.d" ] && starts_at_boot "$_u" || return 1
        set -- "$@" "$UNITS/$_u"
        _units="$_units $_u" _sums="$_sums$_sum "
    done <"$1"
    _found=""
    while read -r _sum _; do _found="$_found$_sum "; done <<EOF
$(sha256sum "$@" 2>/dev/null)
EOF
    [ "$_found" = "$_sums" ] && run_undisturbed $_units
}

run_undisturbed() { # UNIT...: all are active, and no transaction runs
    states_of "$TXN_UNIT" "$@"
    set -- $_states
    case ${1-} in inactive | failed) shift ;; *) return 1 ;; esac
    for _s; do [ "$_s" = active ] || return 1; done
}

states_of() { # UNIT...: sets _states, the ActiveState of each in their order
    _at=org.freedesktop.systemd1 _states=""
    if ! _told=$(busctl call "$_at" /org/freedesktop/systemd1 "$_at.Manager" ListUnitsByNames as $# "$@" 2>/dev/null); then
        _states=$(systemctl is-active "$@") # there is no system bus
        return 0
    fi
    for _u; do # each is told as "NAME" "DESCRIPTION" "LOADED" "STATE" "SUB-STATE" "" "PATH" 0 "" "/"; quotes in it are escaped
        _one=${_told#*"\"$_u\" \""}
        _one=${_one%%"\" \"\" \"/"*}
        _one=${_one%"\" \""*}
        _states="$_states ${_one##*"\" \""}"
    done
}

starts_at_boot() { # UNIT; apply.sh has globbing off
    set +f
    set -- "$UNITS"/*.wants/"$1" "$UNITS"/*.requires/"$1"
    set -f
    for _l; do [ ! -L "$_l" ] || return 0; done
    [ "$(systemctl is-enabled "${1##*/}" 2>/dev/null)" = enabled ] # Alias=, UpheldBy=
}
