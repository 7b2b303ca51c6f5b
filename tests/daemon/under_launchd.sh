#!/usr/bin/env bash
# kvcachedctl service, under the launchd of the user who runs this on a Mac. Run by the workflow; uninstalls at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."
ctl=.venv/bin/kvcachedctl
target=gui/$(id -u)/io.kvcached.daemon
trap '$ctl service uninstall; tail -n 50 ~/Library/Logs/kvcached/* || true' EXIT

pid() { launchctl print "$target" | awk '$1 == "pid" { print $3 }'; }
block() { .venv/bin/python tests/one_block.py "$1"; }

$ctl service print | plutil -lint -
$ctl service install
block put
killed=$(pid)
kill -9 "$killed"
for _ in $(seq 60); do $ctl status > /dev/null 2>&1 && break; sleep 1; done
[ "$(pid)" != "$killed" ]
block get
$ctl service install
block get
$ctl service stop
sleep 3
[ -z "$(pid)" ]
$ctl service start
block get
$ctl status
echo "launchd ran it, and started it again after kill -9"
