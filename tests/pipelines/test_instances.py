"""Machine types: what is shipped is sane, and a person's own file is read or told apart."""

from pathlib import Path

import pytest
import yaml

from droppos.errors import ConfigError
from pipelines.instances import catalogue, find

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"

OWN = """
priced: 2026-10-01
gpus:
  B200: {memory_gb: 192, bf16_tflops: 2250, float32_tflops: 80, link_gbyte_s: 900}
machines:
  ours.8: {cpus: 192, memory_gb: 2048, gpu: B200, gpus: 8, network_gbit: 100, efa_gbit: 3200,
    on_demand: 30}
  ours.old: {cpus: 16, memory_gb: 64, gpu: L4, gpus: 1, network_gbit: 10, on_demand: 1, spot: 0.2}
"""


def test_every_machine_of_cluster_yaml_is_known() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    for kind in config["available_node_types"].values():
        machine = find(kind["node_config"]["InstanceType"])
        assert kind["resources"].get("GPU", 0) == machine.gpus
        assert kind["resources"]["CPU"] in {0, machine.cpus}  # the head gives none away


def test_a_bigger_machine_of_a_family_is_never_cheaper() -> None:
    for family in {name.partition(".")[0] for name in catalogue()}:
        machines = [each for name, each in catalogue().items() if name.startswith(f"{family}.")]
        for one in machines:
            for other in machines:
                if one.gpus <= other.gpus and one.cpus <= other.cpus:
                    assert one.on_demand <= other.on_demand


def test_spot_is_cheaper_and_prices_have_a_day() -> None:
    (priced,) = {machine.priced for machine in catalogue().values()}
    assert priced.year >= 2026
    for machine in catalogue().values():
        assert machine.spot is not None and 0 < machine.spot < machine.on_demand
        assert (
            (machine.gpus > 0) == (machine.bf16_tflops is not None) == (machine.gpu_memory_gb > 0)
        )


def test_more_than_100_gbit_take_more_cards_than_one() -> None:
    """But for p5en, whose cards have 200."""
    for name, machine in catalogue().items():
        assert machine.network_gbit <= (200 if name.startswith("p5en") else 100)
        assert machine.efa_gbit is None or machine.efa_gbit % machine.network_gbit == 0


def test_an_unknown_machine_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"'g6e\.2xlrge' is not known, only such as g6e\.2xlarge"):
        find("g6e.2xlrge")


def test_an_own_file_adds_to_what_is_shipped(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(OWN)
    assert find("ours.8", file).bf16_tflops == 2250
    assert find("ours.8", file).spot is None  # nothing is known of it, so nothing is assumed
    assert [find("ours.8", file).between_gbit(efa) for efa in (False, True)] == [100, 3200]
    old = find("ours.old", file)
    assert old.between_gbit(efa=True) == 10
    assert (old.gpu_memory_gb, old.spot) == (24, 0.2)
    assert find("g5.xlarge", file) == find("g5.xlarge")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("priced: 2026-10-01", "", "needs `priced`"),
        ("priced: 2026-10-01", "priced: soon", "needs `priced`"),
        ("cpus: 16, ", "", r"machines\.ours\.old lacks cpus"),
        ("cpus: 16", "cpus: -16", r"machines\.ours\.old\.cpus is -16, not a positive number"),
        ("cpus: 16", "cpus: 1.5", r"machines\.ours\.old\.cpus is 1\.5, no whole number"),
        ("on_demand: 1,", "on_demand: free,", "on_demand is 'free', not a positive number"),
        ("gpu: L4", "gpu: L5", "a GPU 'L5' that `gpus` does not describe"),
        ("gpu: L4, ", "", "needs both gpu and gpus, or neither"),
        ("bf16_tflops: 2250", "bf16_tflop: 2250", r"gpus\.B200 lacks bf16_tflops"),
        ("spot: 0.2", "spott: 0.2", "has unknown fields: spott"),
        ("machines:", "machine:", "has unknown parts: machine"),
        (OWN, "nothing", "holds no `priced:` and `machines:`"),
        (OWN, "a: [", "cannot be read"),
    ],
)
def test_what_is_wrong_in_an_own_file_is_named(
    tmp_path: Path, before: str, after: str, told: str
) -> None:
    file = tmp_path / "own.yaml"
    assert before in OWN
    file.write_text(OWN.replace(before, after))
    with pytest.raises(ConfigError, match=told):
        catalogue(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml cannot be read"):
        catalogue(tmp_path / "none.yaml")
