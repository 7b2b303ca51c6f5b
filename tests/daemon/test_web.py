"""/metrics, /healthz and /readyz of a real daemon, over real HTTP; what they say is what was done."""

import http.client
import resource
import shutil
import socket
import subprocess
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from support import ROOT_DIR, DaemonProcess, chain, damage_frame, hashes_of, put_all, tiny_spec, wait_until

from kvcached import __version__
from kvcached_client._proto import kvcached_pb2 as pb

SPEC = tiny_spec()
TOKENS = list(range(16))
MIB = 1 << 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def port(daemon: DaemonProcess) -> int:
    port = free_port()
    daemon.restart("--http-port", str(port))
    return port


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body, {name.lower(): value for name, value in response.getheaders()}


def samples(text: str) -> dict[str, float]:
    """By name and labels, as Prometheus' text format reads."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def scrape(port: int) -> dict[str, float]:
    status, text, headers = get(port, "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=")
    return samples(text)


def work(daemon: DaemonProcess) -> int:
    """Puts four blocks twice, asks for six, gets three and one that is absent; how many bytes a block has."""
    with daemon.client(SPEC) as client:
        blocks = put_all(client, chain(client, TOKENS, ballast=4096))
        client.put(blocks)
        assert client.match([*hashes_of(blocks), b"\7" * 32, b"\6" * 32]).n_tokens == 16
        assert len([b for b in client.get([*hashes_of(blocks[:3]), b"\7" * 32]) if b]) == 3
        client.put([chain(client, range(50, 58))[1]])  # its parent is not there
        assert client.delete([blocks[3].block_hash]) == 1
    return sum(array.nbytes for array in blocks[0].tensors.values())


def test_the_counters_are_what_was_done_to_the_token_and_the_byte(daemon: DaemonProcess, port: int) -> None:
    n_bytes = work(daemon)
    found, status = scrape(port), daemon.status()
    expected = {
        "kvcached_lookup_tokens_total": 24,
        "kvcached_lookup_hit_tokens_total": 16,
        'kvcached_put_blocks_total{outcome="stored"}': 4,
        'kvcached_put_blocks_total{outcome="already_held"}': 4,
        'kvcached_put_blocks_total{outcome="refused"}': 1,
        'kvcached_refused_blocks_total{code="FAILED_PRECONDITION"}': 1,
        "kvcached_put_source_bytes_total": 4 * n_bytes,
        'kvcached_block_hits_total{fidelity="EXACT"}': 3,
        'kvcached_block_misses_total{reason="absent"}': 1,
        "kvcached_get_source_bytes_total": 3 * n_bytes,
        'kvcached_evicted_blocks_total{reason="deleted"}': 1,
        "kvcached_corrupt_blocks_total": 0,
        'kvcached_rpc_requests_total{code="OK",method="Put"}': 3,
        'kvcached_rpc_duration_seconds_count{code="OK",method="Put"}': 3,
        'kvcached_encode_duration_seconds_count{fidelity="EXACT"}': 5,
        'kvcached_decode_duration_seconds_count{fidelity="EXACT"}': 3,
        f'kvcached_build_info{{version="{__version__}"}}': 1,
        "kvcached_quota_bytes": 64 * MIB,
        "kvcached_queue_jobs": 0,
        'kvcached_queue_bytes{direction="put"}': 0,
        'kvcached_queue_bytes{direction="get"}': 0,
        "kvcached_stored_bytes" + model_labels(): status.store.stored_bytes,
        "kvcached_source_bytes" + model_labels(): 3 * n_bytes,
        "kvcached_stored_blocks" + model_labels(): 3,
        "kvcached_stored_tokens" + model_labels(): 12,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert found["kvcached_put_stored_bytes_total"] * 3 == pytest.approx(status.store.stored_bytes * 4, rel=0.001)
    assert found["kvcached_used_bytes"] >= status.store.stored_bytes
    assert found["kvcached_up_seconds"] > 0


def model_labels() -> str:
    return f'{{fidelity="EXACT",model="tiny",model_id="{SPEC.model_id.hex()[:16]}"}}'


def test_what_the_system_wrote_to_disk_is_told(daemon: DaemonProcess, port: int) -> None:
    before = scrape(port)["kvcached_disk_written_bytes_total"]
    with daemon.client(SPEC) as client:
        put_all(client, chain(client, TOKENS[:4], ballast=4 * MIB))
    assert scrape(port)["kvcached_disk_written_bytes_total"] - before >= 4 * MIB


def test_corrupt_blocks_are_counted_and_leave(daemon: DaemonProcess, port: int) -> None:
    with daemon.client(SPEC) as client:
        (block,) = put_all(client, chain(client, TOKENS[:4]))
        daemon.stop()
        damage_frame(daemon, block.block_hash)
        daemon.start()
        assert list(client.get([block.block_hash])) == [None]
        assert wait_until(lambda: daemon.status().store.n_blocks == 0)  # removed behind the answer
        assert list(client.get([block.block_hash])) == [None]
    found = scrape(port)
    assert found["kvcached_corrupt_blocks_total"] == 1
    assert found['kvcached_block_misses_total{reason="corrupt"}'] == 1
    assert found['kvcached_block_misses_total{reason="absent"}'] == 1
    assert found['kvcached_evicted_blocks_total{reason="corrupt"}'] == 1


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed (Debian: apt install prometheus)")
def test_prometheus_itself_accepts_the_metrics(daemon: DaemonProcess, port: int) -> None:
    work(daemon)
    text = get(port, "/metrics")[1]
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_openmetrics_is_served_to_those_who_ask(port: int) -> None:
    status, text, headers = get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert status == 200
    assert headers["content-type"].startswith("application/openmetrics-text")
    assert text.endswith("# EOF\n")


def test_healthz_and_readyz_answer_ok(port: int) -> None:
    for path in ("/healthz", "/readyz"):
        assert get(port, path)[:2] == (200, "ok\n")
        assert get(port, path, "HEAD")[:2] == (200, "")
        assert get(port, path, "POST")[0] == 405
    assert get(port, "/")[0] == 404
    assert get(port, "/../etc/passwd")[0] == 404


def test_readyz_says_why_nothing_can_be_stored(daemon: DaemonProcess, port: int) -> None:
    daemon.call("SetConfig", pb.SetConfigRequest(values={"free_floor_bytes": "64TiB"}))
    status, text, _ = get(port, "/readyz")
    assert status == 503
    assert "nothing can be stored" in text
    assert f"{64 << 40} of them are kept free" in text
    assert get(port, "/healthz")[0] == 200


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process are set by prlimit, which is Linux's")
def test_readyz_says_what_the_disk_said_until_a_write_succeeds(daemon: DaemonProcess, port: int) -> None:
    assert daemon.process
    size = (daemon.store / "db/data.mdb").stat().st_size
    with daemon.client(SPEC) as client:
        client.match([])
        (block,) = chain(client, TOKENS[:4], ballast=2 << 20)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        assert client.put([block])[0].code == "RESOURCE_EXHAUSTED"
        status, text, _ = get(port, "/readyz")
        assert (status, "could not write to" in text) == (503, True)
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, unlimited)
        assert client.put([block])[0].code == "OK"
    assert get(port, "/readyz")[0] == 200


def test_more_connections_than_there_is_room_for_are_turned_away_and_the_cache_serves(
    daemon: DaemonProcess, port: int
) -> None:
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(40)]
    for connection in connections[32:]:
        connection.settimeout(5)
        assert connection.recv(1) == b""
    assert daemon.status().pid
    for connection in connections:
        connection.close()
    assert wait_until(lambda: answers(port))
    assert "Traceback" not in daemon.log.read_text()


def answers(port: int) -> bool:
    try:
        return get(port, "/healthz")[0] == 200
    except OSError:
        return False


def test_a_port_in_use_costs_the_metrics_only_and_health_says_so(daemon: DaemonProcess) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        daemon.restart("--http-port", str(port))
        with daemon.client(SPEC) as client:
            put_all(client, chain(client, TOKENS))
        status = daemon.status()
        assert status.web_address == ""
        assert f"http_port {port} cannot be used" in status.web_problem
        assert health(daemon, "") == health_pb2.HealthCheckResponse.SERVING
        assert health(daemon, "kvcached.http") == health_pb2.HealthCheckResponse.NOT_SERVING
    assert "serving without HTTP" in daemon.log.read_text()


def test_with_http_health_says_so(daemon: DaemonProcess, port: int) -> None:
    assert health(daemon, "kvcached.http") == health_pb2.HealthCheckResponse.SERVING
    assert daemon.status().web_address == f"http://127.0.0.1:{port}"
    assert daemon.status().web_problem == ""


def health(daemon: DaemonProcess, service: str) -> int:
    with grpc.insecure_channel(daemon.target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        status: int = health_pb2_grpc.HealthStub(channel).Check(request, timeout=10).status
        return status


def test_connections_that_say_nothing_hold_nobody_up(daemon: DaemonProcess, port: int) -> None:
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
    assert get(port, "/healthz")[0] == 200
    assert daemon.stop() == 0
    for connection in silent:
        connection.close()
    daemon.start()


def test_every_series_is_in_the_operations_manual(daemon: DaemonProcess, port: int) -> None:
    work(daemon)
    families = text_string_to_metric_families(get(port, "/metrics")[1])
    expected = {
        (name_of(family.name, family.type), family.type, family.documentation)
        for family in families
        if family.name.startswith("kvcached_") and not family.name.endswith("_created")
    }
    manual = (ROOT_DIR / "docs/operations.md").read_text().split("<!-- metrics -->")[1].split("<!-- /metrics -->")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in manual.splitlines() if "kvcached_" in line]
    assert {(name, kind, what) for name, kind, _, what in rows} == expected


def name_of(family: str, kind: str) -> str:
    return f"{family}_total" if kind == "counter" else family
