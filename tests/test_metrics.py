import pytest

from fivefold.metrics import METRICS, RESOURCES, show


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (2.6e8, "byte", "260 MB"), (0.0083, "s/token", "8.3 ms/token"), (0.912, "fraction", "91.2 %"),
        (1.5, "USD/Mtoken", "$1.5/Mtoken"), (None, "s", "-"), (0, "byte", "0 byte"), (17.2, "1", "17.2"),
        (999.6, "byte", "1 kB"), (-0.002, "s", "-2 ms"), (7200, "J", "2 Wh"), (12345.6, "token/s", "12,346 token/s"),
    ],
)
def test_show(value: float | None, unit: str, text: str) -> None:
    assert show(value, unit) == text


def test_every_resource_has_a_metric_and_every_metric_a_home() -> None:
    homes = {m.resource for m in METRICS.values()}
    assert homes == {*RESOURCES, "quality"}
