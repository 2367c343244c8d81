# What the host does for Ollama: stores of models, and the ladder of questions after a start. POSIX sh; sent ahead of
# apply.sh, which has the rest.
#
# A store (runners/ollama_store.py says what is in one) is made before a push changes anything, and belongs to the
# generations that name it. In its folder .labdeploy:
#   made      INODE SIZE MTIME SHA256 of the model file it was made from, so that no file is read twice for its sum
#   users/    one file for each host that serves from it: models may lie on a disk that hosts share
# $ROOT/stores/NAME is a link to each store that this host has made, set before it, so that what a crash left is found.

# shellcheck shell=sh disable=SC2015,SC2016,SC2034,SC2045,SC2154
# (as in apply.sh, whose variables these functions read and set)

identity() { stat -Lc '%i %s %Y' "$1" 2>/dev/null; } # FILE

stores_in() { # FOLDER OF A GENERATION
    [ ! -d "$1/services" ] || find "$1/services/" -type f -exec sed -n 's/^store=//p' {} +
}

store_whole() { # of the service that is loaded: was it made, and from the file that is there now?
    _made=$(cat "$store/.labdeploy/made" 2>/dev/null) && [ "${_made% *}" = "$(identity "$model")" ]
}

stale_stores() { # FOLDER OF A GENERATION: prints its units whose store is not whole
    [ -d "$1/stores" ] || return 0
    for _u in $(units_in "$1"); do
        load_service "$1" "$(service_of "$_u")"
        [ -z "$store" ] || store_whole || printf ' %s' "$_u"
    done
}

preflight_version() { # NAME: is the program that will start the one that was planned for?
    _said=$(as_nobody env HOME=/nonexistent OLLAMA_HOST=127.0.0.1:1 timeout 20 "$binary" --version 2>&1)
    _v=$(printf '%s\n' "$_said" | sed -n 's/.*version is \([0-9A-Za-z.+-]*\).*/\1/p' | tail -n 1)
    [ -z "$_v" ] || [ "$VERB" = rollback ] || version_suits "$_v" ||
        refuse 2 "$1: $binary is Ollama $_v, the plan is for $version" "labdeploy probe {host}"
}

preflight_store() { # NAME: can the model get into its store?
    ! store_whole || return 0
    case $import in
        link) # of two folders: on an overlay a file may show the device of its layer
            _file=$(readlink -f "$model")
            [ "$(stat -c %d "${_file%/*}/")" = "$(stat -c %d "${store%/.ollama/*}/")" ] || refuse_link "$1" "two file systems" ;;
        copy) room "${store%/.ollama/*}" $((model_bytes / 1024 + SPACE_KIB)) ;;
    esac
}

refuse_link() { # NAME WHY: what a copy would cost, for the one who decides
    _free=$(df -Pk "${store%/.ollama/*}" | awk 'NR == 2 { print int($4 / 1024) }')
    refuse 2 "$1: no hard link of $model in $store ($2); a copy takes $((model_bytes / 1048576)) MiB, $_free MiB are free" \
        "write import_by: copy  # in the inventory, for this service"
}

version_suits() { # VERSION: is it the one of the plan? 0.0.0 is a build that was not told its own
    case $version in
        '' | "$1") return 0 ;;
        '>='*) [ -n "$1" ] || return 1 ;;
        *) [ "$1" = 0.0.0 ]; return ;;
    esac
    [ "$1" = 0.0.0 ] || [ "$(printf '%s\n' "$1" "${version#>=}" | sort -V | head -n 1)" = "${version#>=}" ]
}

# --- stores -----------------------------------------------------------------------------------------------------

make_stores() { # every store that the new generation names and that is not there; nothing has changed yet
    for _u in $(units_in "$NEW"); do
        _name=$(service_of "$_u")
        load_service "$NEW" "$_name"
        [ -n "$store" ] || continue
        mkdir -p "$ROOT/stores" && ln -sfn "$store" "$ROOT/stores/${store##*/}" && sync "$ROOT/stores" ||
            refuse 1 "cannot write $ROOT"
        store_whole || make_store "$_name"
        : >"$store/.labdeploy/users/$(cat /etc/machine-id)" ||
            refuse 1 "$_name: cannot write $store"
    done
}

make_store() { # NAME: aside, durable, then renamed
    emit step import "$1" "$((model_bytes / 1048576))"
    rm -rf "$store.new" && mkdir -p "${store%/*}" && cp -R "$NEW/stores/$1" "$store.new" 2>/dev/null &&
        mkdir -p "$store.new/.labdeploy/users" || refuse 1 "$1: cannot write ${store%/*}" "it must be on a disk that the host may write"
    _sum=$(sum_of "$model")
    [ -n "$_sum" ] || refuse 1 "$1: cannot read $model"
    _blob=$store.new/blobs/sha256-$_sum
    case $import in
        link) _said=$(ln "$(readlink -f "$model")" "$_blob" 2>&1) || { rm -rf "$store.new"; refuse_link "$1" "${_said##*: }"; } ;;
        copy) cp --reflink=auto "$model" "$_blob" || { rm -rf "$store.new"; refuse 1 "$1: cannot copy $model to $_blob"; } ;;
    esac
    [ ! -d "$store/.labdeploy/users" ] || cp -R "$store/.labdeploy/users" "$store.new/.labdeploy/"
    find "$store.new/manifests" -type f -exec sed -i "s/@model-digest@/sha256:$_sum/" {} + &&
        printf '%s %s\n' "$(identity "$model")" "$_sum" >"$store.new/.labdeploy/made" && durable "$store.new" &&
        rm -rf "$store" && mv -T "$store.new" "$store" && sync "${store%/*}" || refuse 1 "$1: cannot write $store"
}

sum_of() { # FILE: from a store that was made of this very file, else by reading all of it
    _known=$(find -L "$ROOT/stores" -mindepth 3 -maxdepth 3 -name made -exec sed -n "s/^$(identity "$1") //p" {} + 2>/dev/null |
        head -n 1)
    [ -n "$_known" ] || _known=$(sha256sum <"$1") && printf '%s' "${_known%% *}"
}

prune_stores() { # those that neither what runs nor the next rollback needs
    [ -d "$ROOT/stores" ] || return 0
    _kept=$(for _g in current good previous; do stores_in "$ROOT/$_g"; done)
    for _s in $(ls "$ROOT/stores"); do
        _store=$(readlink "$ROOT/stores/$_s")
        ! printf '%s\n' "$_kept" | grep -qxF -e "$_store" || continue
        rm -rf "$_store.new" "$_store/.labdeploy/users/$(cat /etc/machine-id)"
        rmdir "$_store/.labdeploy/users" 2>/dev/null # another host may serve from it
        [ -d "$_store/.labdeploy/users" ] || rm -rf "$_store"
        rmdir "${_store%/*}" 2>/dev/null
        rm -f "$ROOT/stores/$_s"
    done
}

# --- the ladder: each rung says in its own words why it does not hold --------------------------------------------------

ladder_ollama() { # ready was answered by /api/version, which comes after Ollama has looked for GPUs
    api=${ready%/version}
    rung_version || return 1
    [ "$import" != api ] || create_by_api || return 1
    if ! http 60 "$api/tags" | grep -qF "\"$served:latest\""; then
        [ -n "$import" ] || { emit warning "$_name" "is up, but model $served is not in its store yet"; return 0; }
        unhealthy store "this Ollama does not list $served, which lies in its store; import_by: api has it make its own copy"
        return 1
    fi
    rung_loaded && rung_placed && rung_token
}

rung_version() {
    _v=$(http 10 "$ready" | sed -n 's/.*"version":"\([^"]*\)".*/\1/p')
    version_suits "$_v" || { unhealthy version "Ollama ${_v:-of no version} answers, the plan is for $version"; return 1; }
}

rung_loaded() { # without a prompt it only loads; keep_alive is that of the unit
    _said=$(http "$deadline_s" "$api/generate" "{\"model\":\"$served\",\"stream\":false}") || { unhealthy load "$_said"; return 1; }
}

# Of the entry of one model in /api/ps: `SIZE SIZE_VRAM CONTEXT`, `-` for what this version does not tell.
LOADED='
BEGIN { size = vram = context = "-" }
$1 == "\"name\"" { ours = ($2 ":" $3 == "\"" model ":latest\"") }
ours && $1 == "\"size\"" { size = $2 }
ours && $1 == "\"size_vram\"" { vram = $2 }
ours && $1 == "\"context_length\"" { context = $2 }
END { print size, vram, context }'

rung_placed() { # what does not fit on the GPU goes to the CPU without an error, and is slow
    read -r _size _vram _ctx <<EOF
$(http 10 "$api/ps" | tr ',{}[]' '\n' | awk -F: -v model="$served" "$LOADED")
EOF
    [ "$_size" != - ] || { unhealthy load "$api/ps does not list $served after it was loaded"; return 1; }
    [ "$_vram" != - ] || _vram=0
    [ "$offload" != full ] || [ "$_vram" = "$_size" ] || {
        unhealthy GPU "$((_vram / 1048576)) of $((_size / 1048576)) MiB are on it, all was planned: the rest is on the CPU"
        return 1
    }
    [ "$_ctx" = - ] || [ -z "$n_ctx" ] || [ "$_ctx" = "$n_ctx" ] || {
        unhealthy context "loaded with $_ctx tokens, $n_ctx were planned"
        return 1
    }
}

rung_token() { # one token, streamed: its line is the first byte of the answer
    _said=$(http "$deadline_s" "$api/generate" \
        "{\"model\":\"$served\",\"prompt\":\"Hello\",\"raw\":true,\"options\":{\"num_predict\":1}}" '\n%{time_starttransfer}') ||
        { unhealthy "one token" "$_said"; return 1; }
    case $_said in *'"error"'*) unhealthy "one token" "$_said"; return 1 ;; esac
    first_token_s=$(printf '%s\n' "$_said" | tail -n 1)
}

# --- the API's own way, where a version does not take what lies in its store ------------------------------------------

create_by_api() { # the model is sent to Ollama and made there, unless what it has was made so
    _recipe=$(sha256sum <"$folder/stores/$_name/create.json") _file=$(identity "$model")
    [ "$_recipe $_file $(model_digest)" != "$(cat "$ROOT/created-$_name" 2>/dev/null)" ] || return 0
    _sum=$(sum_of "$model")
    emit warning "$_name" "$served is sent to Ollama, which makes a copy: $((model_bytes / 1048576)) MiB, up to three times that meanwhile"
    curl -sf -I -m 30 -o /dev/null "$api/blobs/sha256:$_sum" || _said=$(curl -sS --fail-with-body -m "$deadline_s" \
        -X POST -T "$(readlink -f "$model")" "$api/blobs/sha256:$_sum" 2>&1) || { unhealthy upload "$_said"; return 1; }
    _body=$(sed "s/@model-digest@/sha256:$_sum/" "$folder/stores/$_name/create.json")
    _said=$(http "$deadline_s" "$api/create" "$_body") || { unhealthy create "$_said"; return 1; }
    case $_said in *'"error"'*) unhealthy create "$_said"; return 1 ;; esac
    printf '%s %s %s\n' "$_recipe" "$_file" "$(model_digest)" >"$ROOT/created-$_name"
}

model_digest() { # what Ollama calls the model it has by this name; nothing where it has none
    http 60 "$api/tags" | tr ',{}[]' '\n' | awk -F: -v model="$served" '
        $1 == "\"name\"" { ours = ($2 ":" $3 == "\"" model ":latest\"") }
        ours && $1 == "\"digest\"" { gsub(/"/, "", $2); print $2; exit }'
}
