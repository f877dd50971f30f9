import jax
import pytest

from sharding.mesh import MESH_AXES, make_mesh, parse_mesh


def test_axes_left_out_have_size_one():
    assert parse_mesh("data=1, model=2") == {"data": 1, "model": 2, "expert": 1}
    assert parse_mesh("") == {"data": 1, "model": 1, "expert": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model", "axis=size"),
        ("stage=2", "stage=2"),
        ("model=2,model=2", "twice"),
        ("model=two", "two"),
        ("model=0", "at least 1"),
        ("model=-1,data=-1", "only one"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_mesh(text)


def test_mesh_over_given_devices():
    devices = [FakeDevice(i) for i in range(8)]
    mesh = make_mesh("data=2,model=2", devices)
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {"data": 2, "model": 2, "expert": 1}
    assert [d.id for d in mesh.devices.flat] == [0, 1, 2, 3]
    assert make_mesh("auto", devices).shape["model"] == 8
    assert dict(make_mesh("data=2,model=-1", devices).shape) == {"data": 2, "model": 4, "expert": 1}


def test_too_few_devices_is_told_with_what_to_do():
    with pytest.raises(ValueError, match=r"needs 6 devices; there are 2.*--cpu-devices 6"):
        make_mesh("data=3,model=2", [FakeDevice(0), FakeDevice(1)])
    with pytest.raises(ValueError, match="cannot be divided"):
        make_mesh("data=3,model=-1", [FakeDevice(i) for i in range(4)])


def test_auto_takes_every_device():
    assert make_mesh().size == len(jax.devices())


class FakeDevice:
    platform = "cpu"
    device_kind = "fake"
    process_index = 0

    def __init__(self, id):
        self.id = id
