#!/usr/bin/env bash
# Installs syncd from this clone on Debian 12, 13 or newer: sudo systemd/install.sh [--no-restart | --rollback | --uninstall]
#
# Each version gets a folder of its own, /opt/syncd/VERSION-TIME, and becomes the running one by one rename of a symlink:
# ended anywhere, this can be called again, and what ran before runs on. /opt/syncd/current is the version that the units
# start, /opt/syncd/previous the one that --rollback goes back to.
set -euo pipefail
umask 022
cd "$(dirname "$(readlink -f "$0")")/.."

readonly OPT=/opt/syncd UNITS=/etc/systemd/system ON_PATH=/usr/local/bin/syncd
trap 'exit 130' INT
trap 'exit 143' TERM
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

say() { printf 'install.sh: %s\n' "$*"; }
die() { # what is wrong, and what to do
    printf 'install.sh: %s\n' "$@" >&2
    exit 1
}
point() { # point LINK TARGET: in one step, so that the link always leads somewhere
    ln -sfn "$2" "$OPT/$1.new"
    mv -T "$OPT/$1.new" "$OPT/$1"
}
version_of() { basename "$(readlink "$OPT/$1" || true)"; } # of current or previous; empty where there is none
in_use() { grep -qsaF "$1/" /proc/[0-9]*/maps /proc/[0-9]*/cmdline; }
kept_out() { # kept_out UNIT: another process, like a backfill, holds its lock; systemd starts it once that has ended
    [[ $(systemctl show --property=ExecMainStatus --value "$1") == 11 ]] && say "$1 waits for the process that holds its lock"
}
instances() { # instances [STATE]: the units of all practices that run, or are in that state; the mirrors first
    local state=${1:-active,activating,reloading,deactivating}
    systemctl list-units --plain --no-legend --state="$state" 'syncd@*' | awk '{print $1}'
    systemctl list-units --plain --no-legend --state="$state" 'syncd-backfill@*' | awk '{print $1}'
}

check_machine() {
    ((EUID == 0)) || die "only root can install: sudo systemd/install.sh"
    [[ -d /run/systemd/system ]] || die "systemd does not run here: syncd is a systemd service"
    if [[ -e $ON_PATH && $(readlink "$ON_PATH" || true) != "$OPT"/* ]]; then
        die "$ON_PATH is not ours: move it away, then call this again"
    fi
    mkdir -p "$OPT"
    exec 9>"$OPT/.lock"
    flock -n 9 || die "another install.sh runs: wait for its end"
}

check_python() {
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
        || die "Python 3.11 or newer is needed: apt install python3 python3-venv"
    python3 -c 'import ensurepip, venv' 2>/dev/null || die "python3-venv is missing: apt install python3-venv"
}

build() { # into $new, whole or not at all
    new=$OPT/$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)-$(date -u +%Y%m%dT%H%M%SZ)
    say "making $new"
    trap 'rm -rf "$new"; say "not installed, nothing was changed"' EXIT
    python3 -m venv "$new"
    "$new/bin/python" -m pip install -q --require-hashes --only-binary :all: -r requirements.txt \
        || die "the libraries could not be installed: see above; pip must reach a package index, or a folder of wheels"
    "$new/bin/python" -m pip install -q --no-deps --no-build-isolation .
    install -D -m 0644 -t "$new/systemd" systemd/*.service systemd/*.target
    "$new/bin/syncd" version >/dev/null
    touch "$new/unproven" # until what ran before runs with it
    sync -f "$new"
    trap - EXIT
}

put_units() { # those of the current version
    install -m 0644 -t "$UNITS" "$OPT"/current/systemd/*
    ln -sfn "$OPT/current/bin/syncd" "$ON_PATH"
    systemctl daemon-reload
    systemctl is-enabled -q syncd.target || systemctl enable -q --now syncd.target
}

restart() { # restart UNIT...: one by one; a daemon is up when it says READY
    local unit
    for unit in "$@"; do
        say "restarting $unit"
        systemctl restart "$unit" || kept_out "$unit" || die \
            "$unit does not come up with $(version_of current): journalctl -u $unit says why." \
            "What was not restarted yet still runs as before. Mend the cause and call this again, or go back to" \
            "$(version_of previous): sudo systemd/install.sh --rollback"
    done
}

remove_old() { # all but the current version, the previous one, and those in use
    local folder
    for folder in "$OPT"/*-*/; do
        folder=${folder%/}
        case ${folder##*/} in "$(version_of current)" | "$(version_of previous)" | '*-*') continue ;; esac
        if in_use "$folder"; then say "$folder is still in use: kept"; else rm -rf "$folder"; fi
    done
}

do_install() {
    check_python
    local running
    build
    mapfile -t running < <(instances)
    # A version that never came up is nothing to go back to.
    if [[ -e $OPT/current && ! -e $OPT/current/unproven ]]; then point previous "$(readlink "$OPT/current")"; fi
    point current "${new##*/}"
    put_units
    say "installed: $("$ON_PATH" version)"
    if [[ $1 == restart ]]; then
        restart "${running[@]}"
        rm -f "$OPT/current/unproven"
        remove_old
    else
        rm -f "$OPT/current/unproven"
        say "running as before, until restarted: ${running[*]:-none}"
    fi
    mapfile -t running < <(instances failed)
    if ((${#running[@]})); then say "these had failed before, and were left alone: ${running[*]}"; fi
}

do_rollback() {
    [[ -e $OPT/previous ]] || die "there is no previous version to go back to"
    local running config name
    mapfile -t running < <(instances; instances failed | grep '^syncd@')
    point current "$(readlink "$OPT/previous")"
    put_units
    say "back to $("$ON_PATH" version) in $OPT/$(version_of current)"
    for config in /etc/syncd/*/config.toml; do
        [[ -e $config ]] || continue
        name=$(basename "$(dirname "$config")")
        # Only an index that a later version migrated is put back: from the copy that was made before, and the archive.
        if [[ $("$ON_PATH" -p "$name" plan 2>&1 >/dev/null || true) == *'this syncd knows schema'* ]]; then
            say "the index of $name is of the later version: from its copy and the archive"
            systemctl stop "syncd@$name" "syncd-backfill@$name"
            "$ON_PATH" -p "$name" reindex >/dev/null || die "mend what is named above, then call this again"
        fi
    done
    restart "${running[@]}"
}

do_uninstall() {
    local unit
    for unit in $(instances) "$UNITS"/*.wants/syncd@*.service; do
        if [[ $unit == *'*'* ]]; then continue; fi
        systemctl disable -q --now "${unit##*/}" # takes no globs
    done
    if [[ -e $UNITS/syncd.target ]]; then systemctl disable -q --now syncd.target; fi
    rm -f "$UNITS"/syncd{,-backfill,-alert}@.service "$UNITS/syncd.target" "$ON_PATH"
    systemctl daemon-reload
    systemctl reset-failed 'syncd@*' 'syncd-backfill@*' 'syncd-alert@*' 2>/dev/null || true
    rm -rf "$OPT"
    say "the program and its units are gone. Kept, and yours to remove:"
    say "  settings and keys  /etc/syncd, and drop-ins in $UNITS/syncd*.d"
    say "  state              /var/lib/syncd"
    say "  logs               /var/log/syncd"
    say "  archives           as [archive] path in /etc/syncd/*/config.toml says; else /srv/archive"
    say "  users              syncd-NAME, who own state, logs and archive"
    if compgen -G "$UNITS/syncd-sftp@*.service" >/dev/null; then
        say "  SFTP sites         they still serve: systemctl disable --now syncd-sftp@NAME, userdel drop-NAME"
    fi
}

case "$#:${1:-}" in
    0:) check_machine; do_install restart ;;
    1:--no-restart) check_machine; do_install no-restart ;;
    1:--rollback) check_machine; do_rollback ;;
    1:--uninstall) check_machine; do_uninstall ;;
    *) die "usage: sudo systemd/install.sh [--no-restart | --rollback | --uninstall]" ;;
esac
