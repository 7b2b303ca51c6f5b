"""Delete, pins, status, check, configuration, health and reflection, over a real socket."""

import itertools
import threading
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support import DaemonProcess, chain, hashes_of, put_all, tiny_spec, wait_until

from kvcached import __version__
from kvcached.config import Config
from kvcached_client import DaemonError
from kvcached_client._proto import kvcached_pb2 as pb
from kvcached_client.spec import ModelSpec

TOKENS = list(range(16))
_serial = itertools.count()


def fresh_spec() -> ModelSpec:
    """A model that no other test knows."""
    return tiny_spec(weights=f"administration {next(_serial)}")


def test_delete_takes_a_block_with_its_descendants(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        hashes = hashes_of(put_all(client, chain(client, TOKENS)))
        request = pb.DeleteRequest(model_id=client.model_id, block_hashes=[hashes[2], b"\7" * 32])
        assert shared_daemon.call("Delete", request).n_deleted == 2
        assert len(client.match(hashes).blocks) == 2
        assert [b is not None for b in client.get(hashes)] == [True, True, False, False]
        assert shared_daemon.call("Delete", request).n_deleted == 0


def test_a_pinned_chain_survives_what_evicts_others(daemon: DaemonProcess) -> None:
    daemon.restart("--quota-bytes", "8MiB")
    with daemon.client(tiny_spec()) as client:
        pinned = chain(client, TOKENS[:8], ballast=1 << 20)
        client.put(pinned)
        names = {"model_id": client.model_id, "block_hashes": [pinned[1].block_hash]}
        assert daemon.call("Pin", pb.PinRequest(**names)).n_pinned == 1
        for n in range(20):
            (result,) = client.put(chain(client, [n, 7, 7, 7], ballast=1 << 20))
            assert result.code == "OK"
        assert all(client.get(hashes_of(pinned)))
        status = daemon.status()
        assert status.counters['evicted_blocks_total{reason="quota"}'] == 22 - status.store.n_blocks > 0
        assert status.store.used_bytes <= 8 << 20
        assert daemon.call("Unpin", pb.UnpinRequest(**names)).n_unpinned == 1
        for n in range(20, 40):
            client.put(chain(client, [n, 7, 7, 7], ballast=1 << 20))
        assert client.match(hashes_of(pinned)).n_tokens == 0


def test_a_pin_may_have_an_end(daemon: DaemonProcess) -> None:
    daemon.restart("--quota-bytes", "4MiB")
    with daemon.client(tiny_spec()) as client:
        (pinned,) = chain(client, TOKENS[:4], ballast=2 << 20)
        client.put([pinned])
        for ttl_seconds in (2**64 - 1, 1):
            names = {"model_id": client.model_id, "block_hashes": [pinned.block_hash], "ttl_seconds": ttl_seconds}
            assert daemon.call("Pin", pb.PinRequest(**names)).n_pinned == 1
            (other,) = chain(client, [ttl_seconds % 1000, 7, 7, 7], ballast=2 << 20)
            if ttl_seconds > 1:
                assert client.put([other])[0].code == "RESOURCE_EXHAUSTED"
        assert wait_until(lambda: client.put([other])[0].code == "OK")
        assert list(client.get([pinned.block_hash])) == [None]


def test_the_status_counts_what_was_done(daemon: DaemonProcess) -> None:
    with daemon.client(tiny_spec(), "n") as client:
        blocks = put_all(client, chain(client, TOKENS))
        client.put(blocks[:1])
        client.match([*hashes_of(blocks), b"\7" * 32])
        client.match([b"\7" * 32])
        list(client.get([*hashes_of(blocks[:3]), b"\7" * 32]))
        client.put([replace(chain(client, range(50, 58))[1], index=1)])
    status = daemon.status()
    counters = status.counters
    assert counters['put_blocks_total{outcome="stored"}'] == 4
    assert counters['put_blocks_total{outcome="already_held"}'] == 1
    assert counters['put_blocks_total{outcome="refused"}'] == 1
    assert counters["put_source_bytes_total"] == 4 * 512
    assert counters["lookup_tokens_total"] == 6 * 4
    assert counters["lookup_hit_tokens_total"] == 4 * 4
    assert counters['block_hits_total{fidelity="EXACT"}'] == 3
    assert counters['block_misses_total{reason="absent"}'] == 1
    assert counters["get_source_bytes_total"] == 3 * 512
    assert counters['rpc_requests_total{method="Match",code="OK"}'] == 2
    store = status.store
    assert (store.n_blocks, store.n_tokens, store.source_bytes) == (4, 16, 4 * 512)
    assert store.stored_bytes == counters["put_stored_bytes_total"]
    assert 0 < store.stored_bytes <= store.used_bytes <= store.file_bytes
    assert store.quota_bytes == 64 << 20
    assert store.free_disk_bytes > 0
    assert store.path == str(daemon.store)
    assert status.socket_path == str(daemon.socket)
    assert daemon.process is not None
    assert (status.version, status.pid) == (__version__, daemon.process.pid)
    assert status.uptime_seconds > 0
    (model,) = status.models
    (kept,) = model.fidelities
    assert (kept.kind, kept.n_blocks, kept.n_tokens, kept.source_bytes) == (pb.FIDELITY_KIND_EXACT, 4, 16, 4 * 512)
    assert (status.pool.put_bytes, status.pool.get_bytes, status.pool.n_jobs) == (0, 0, 0)


def test_a_put_that_joins_another_one_is_counted_too(daemon: DaemonProcess) -> None:
    with daemon.client(tiny_spec()) as client:
        (block,) = chain(client, TOKENS[:4], ballast=8 << 20)
        client.match([block.block_hash])
        threads = [threading.Thread(target=client.put, args=([block],)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    counters = daemon.status().counters
    assert sum(value for name, value in counters.items() if name.startswith("put_blocks_total")) == 8


def test_check_is_clean_and_counts(shared_daemon: DaemonProcess) -> None:
    with shared_daemon.client(fresh_spec()) as client:
        put_all(client, chain(client, TOKENS))
    report = shared_daemon.call("Check", pb.CheckRequest(frames=True))
    assert list(report.problems) == []
    assert report.n_frames_decoded == report.n_blocks == shared_daemon.status().store.n_blocks >= 4
    assert shared_daemon.call("Check", pb.CheckRequest()).n_frames_decoded == 0


def test_get_config_names_every_setting_with_its_value(shared_daemon: DaemonProcess) -> None:
    settings_ = shared_daemon.call("GetConfig", pb.GetConfigRequest()).settings
    assert [s.name for s in settings_] == list(Config.model_fields)
    assert all(s.description for s in settings_)
    by_name = {s.name: s for s in settings_}
    assert by_name["quota_bytes"].value == str(64 << 20)
    assert by_name["quota_bytes"].live
    assert by_name["socket_path"].value == str(shared_daemon.socket)
    assert not by_name["socket_path"].live


# ---- health and reflection


@pytest.mark.parametrize("service", ["", "kvcached.v1.KvCache"])
def test_health_says_serving(shared_daemon: DaemonProcess, service: str) -> None:
    with grpc.insecure_channel(shared_daemon.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_health_knows_no_other_service(shared_daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(shared_daemon.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Check(health_pb2.HealthCheckRequest(service="kvcached.v2.KvCache"), timeout=10)
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_service_and_knows_its_file(shared_daemon: DaemonProcess) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="kvcached.v1.KvCache"),
    ]
    with grpc.insecure_channel(shared_daemon.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed, file = stub.ServerReflectionInfo(iter(requests), timeout=10)
    names = {service.name for service in listed.list_services_response.service}
    assert names == {"kvcached.v1.KvCache", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert file.file_descriptor_response.file_descriptor_proto == [pb.DESCRIPTOR.serialized_pb]


def test_an_unknown_method_is_unimplemented(shared_daemon: DaemonProcess) -> None:
    with grpc.insecure_channel(shared_daemon.target) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/kvcached.v1.KvCache/Nothing")(b"", timeout=10)
    assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_that_fails_names_its_status(shared_daemon: DaemonProcess) -> None:
    with pytest.raises(DaemonError, match="FAILED_PRECONDITION: unknown model abcd: register it first") as raised:
        shared_daemon.call("Match", pb.MatchRequest(model_id=b"\xab\xcd"))
    assert raised.value.code == "FAILED_PRECONDITION"


def test_engines_that_announce_themselves_are_listed_latest_first(daemon: DaemonProcess) -> None:
    with daemon.client(fresh_spec(), "tenant") as client:
        for pid in range(1, 41):
            assert client.announce(pb.Engine(name=f"engine {pid}", pid=pid, prompt_tokens=10 * pid))
        assert client.announce(pb.Engine(name="engine 20", pid=20, prompt_tokens=7, seconds_since_announced=1e9))
    engines = daemon.status().engines
    assert [engine.pid for engine in engines] == [20, *range(40, 20, -1), *range(19, 8, -1)]
    assert (engines[0].prompt_tokens, engines[0].namespace, engines[0].model_id) == (7, "tenant", client.model_id)
    assert 0 <= engines[0].seconds_since_announced < engines[-1].seconds_since_announced


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"name": "x" * 129}, "an engine's name has at most 128 bytes"),
        ({"model_id": b"short"}, "a model id has 32 bytes, got 5"),
        ({"namespace": "x" * 256}, "a namespace has at most 255 bytes"),
        ({"prefill_tokens_per_second": float("nan")}, "prefill_tokens_per_second must be finite and not negative"),
        ({"name": "x\x1b[31m"}, "an engine's name must be printable"),
        ({"namespace": "a\nb"}, "an engine's namespace must be printable"),
        ({"prompt_tokens": 5, "local_tokens": 3, "restored_tokens": 3}, "of 5 prompt tokens, 3 cannot be in memory"),
        ({"restore_tokens_per_second": -1.0}, "restore_tokens_per_second must be finite and not negative, got -1.0"),
    ],
)
def test_an_engine_that_describes_itself_wrongly_is_refused(
    fields: dict[str, Any], complaint: str, shared_daemon: DaemonProcess
) -> None:
    engine = pb.Engine(**{"name": "e", "model_id": bytes(32), **fields})
    with pytest.raises(DaemonError, match=complaint) as caught:
        shared_daemon.call("Announce", pb.AnnounceRequest(engine=engine))
    assert caught.value.code == "INVALID_ARGUMENT"
    assert engine not in shared_daemon.status().engines
