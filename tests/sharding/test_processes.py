"""Who the processes of an engine are: from flags, and from what clusters say."""

import pytest

from sharding.processes import Processes, _local_devices, find

LWS = {"LWS_LEADER_ADDRESS": "jaxserve-0.jaxserve.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "2"}


def test_explicit():
    assert find("10.0.0.1:1234", 4, 3) == Processes("10.0.0.1:1234", 4, 3, "flags")
    assert find("[::1]:1234", 2, 0).host == "::1"
    assert find("host:1", 1, 0) is None, "one process is no group"


def test_leader_worker_set():
    found = find("auto", environment=LWS)
    assert found == Processes("jaxserve-0.jaxserve.default:8476", 4, 2, "LeaderWorkerSet")
    assert found.host == "jaxserve-0.jaxserve.default"
    assert find("auto", environment=LWS | {"JAX_COORDINATOR_PORT": "99"}).coordinator.endswith(":99")
    assert find("auto", environment=LWS | {"LWS_GROUP_SIZE": "1"}) is None


def test_slurm(monkeypatch):
    variables = {
        "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[03-04]", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find("auto", environment={})
    assert (found.count, found.index, found.found_by, found.local_devices) == (4, 3, "Slurm", (1,))
    assert found.host == "node03"
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    assert find("auto", environment={}).local_devices is None, "a process that has its host to itself takes all devices"


def test_open_mpi(monkeypatch):
    variables = {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    found = find("auto", environment={})
    assert (found.count, found.index, found.found_by, found.host) == (2, 1, "Open MPI", "10.96.0.1")


def test_nothing_found(monkeypatch):
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    with pytest.raises(ValueError, match="--coordinator auto found no several processes here"):
        find("auto", environment={})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((None, 2, None), "need --coordinator"),
        (("auto", None, 1), "finds --num-processes and --process-id itself"),
        (("nowhere", 2, 1), "must be HOST:PORT"),
        (("host:99999", 2, 1), "must be HOST:PORT"),
        (("host:1", 2, None), "needs --num-processes"),
        (("host:1", 2, 2), "it must be from 0 to 1"),
    ],
)
def test_wrong_flags(given, said):
    with pytest.raises(ValueError, match=said):
        find(*given)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [({}, None), ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),3"}, (2,)), ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None)],
)
def test_local_devices(variables, devices):
    assert _local_devices(2, variables) == devices
    assert _local_devices(None, variables) is None
