#!/usr/bin/env bash
# kvcachedctl service, under a systemd user manager of its own. Runs as root in a mount namespace (see the test), where
# /run is a fresh tmpfs, so that nothing of the machine is touched. Prints "ok STEP" for each step that held.
set -euo pipefail

mount -t tmpfs tmpfs /run
mkdir -p /run/systemd/system /run/user/0 # a manager refuses to run unless the former exists
chmod 700 /run/user/0
export XDG_RUNTIME_DIR=/run/user/0 HOME=$TEST_DIR/home
unset DBUS_SESSION_BUS_ADDRESS XDG_CONFIG_HOME XDG_CACHE_HOME
mkdir -p "$HOME/.config/kvcached"
printf 'quota_bytes = "64MiB"\nfree_floor_bytes = 0\nhttp_port = 0\n' > "$HOME/.config/kvcached/config.toml"

/lib/systemd/systemd --user --log-target=console > "$TEST_DIR/systemd.log" 2>&1 &
manager=$!
trap 'systemctl --user stop kvcached.service 2> /dev/null || true; kill $manager' EXIT
timeout 30 bash -c 'until systemctl --user list-units > /dev/null 2>&1; do sleep 0.1; done'

pid() { systemctl --user show kvcached.service --property=MainPID --value; }
block() { "$PYTHON" "$(dirname "$0")/../one_block.py" "$1"; }

"$CTL" service install
[ "$(systemctl --user is-enabled kvcached.service)" = enabled ]
echo "ok installed"
block put && echo "ok put"
killed=$(pid)
kill -9 "$killed"
timeout 60 bash -c "until $CTL status > /dev/null 2>&1; do sleep 0.2; done"
[ "$(pid)" != "$killed" ] && echo "ok restarted after kill -9"
block get && echo "ok got"
"$CTL" service install | grep "installed already" > /dev/null
block get && echo "ok installed twice"
"$CTL" service stop
[ "$(systemctl --user is-active kvcached.service)" = inactive ] && echo "ok stopped"
"$CTL" service start
block get && echo "ok started"
"$CTL" service uninstall
[ ! -e "$HOME/.config/systemd/user/kvcached.service" ] && ! "$CTL" status 2> /dev/null && echo "ok gone"
