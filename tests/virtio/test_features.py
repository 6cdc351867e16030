"""What the device offers, and what it accepts."""

import itertools

import pytest
from virtio.clauses import clause
from virtio.driver import ACKNOWLEDGED, ALL, LIVE, NEGOTIATED, PLAIN, Driver
from virtio.names import F_NOTIFICATION_DATA, MMIO, F

# Features that need others: "Feature bit requirements" of the device types and "Reserved Feature Bits". A console has
# none of its own, and of the reserved ones none needs another.
OPTIONAL = [F.SIZE, F.EMERG_WRITE, F.INDIRECT_DESC, F.EVENT_IDX]
NOT_OFFERED = {
    "MULTIPORT": F.MULTIPORT,
    "bit 24": 1 << 24,
    "RING_PACKED": F.RING_PACKED,
    "IN_ORDER": F.IN_ORDER,
    "NOTIFICATION_DATA": F_NOTIFICATION_DATA,
    "RING_RESET": F.RING_RESET,
    "bit 63": 1 << 63,
}


@clause("Feature Bits", "offer a feature that requires another one, which is not offered")
@clause("Reserved Feature Bits", "offer VIRTIO_F_VERSION_1")
@clause("Reserved Feature Bits", "offer VIRTIO_F_SR_IOV, unless it is a PCI device with SR-IOV")
def test_exactly_these_features_are_offered_of_which_none_needs_another(driver: Driver) -> None:
    """VIRTIO 1.2 "Feature Bits" and "Reserved Feature Bits"."""
    assert F(driver.features_offered()) == ALL


@clause(
    "MMIO Device Register Layout",
    "DeviceFeaturesSel selects which 32 bits DeviceFeatures shows, DriverFeaturesSel which DriverFeatures sets",
)
def test_features_are_shown_and_set_by_the_selected_half(driver: Driver) -> None:
    """VIRTIO 1.2 "MMIO Device Register Layout"."""
    shown = {}
    for half in (1, 0, 2, 0xFFFFFFFF):
        driver.write(MMIO.DEVICE_FEATURES_SEL, half)
        shown[half] = driver.read(MMIO.DEVICE_FEATURES)
    assert shown == {1: F.VERSION_1 >> 32, 0: ALL & 0xFFFFFFFF, 2: 0, 0xFFFFFFFF: 0}
    # The other half is kept, whichever is written first.
    driver.write(MMIO.STATUS, ACKNOWLEDGED)
    for half, value in ((1, F.VERSION_1 >> 32), (0, F.MULTIPORT), (0, F.EVENT_IDX)):
        driver.write(MMIO.DRIVER_FEATURES_SEL, half)
        driver.write(MMIO.DRIVER_FEATURES, value)
    driver.write(MMIO.STATUS, NEGOTIATED)
    assert (driver.status, driver.misuse) == (NEGOTIATED, [])


@clause("Feature Bits", "accept any valid subset of the features")
def test_any_subset_with_version_1_is_accepted_and_works(driver: Driver) -> None:
    """VIRTIO 1.2 "Feature Bits"."""
    for count in range(len(OPTIONAL) + 1):
        for chosen in itertools.combinations(OPTIONAL, count):
            driver.forget()
            driver.go_live(PLAIN | sum(chosen))
            driver.queue(1).send(driver.readable(b"works"))
            assert (driver.output, driver.misuse) == (b"works", []), chosen


@clause("Feature Bits", "fail to set FEATURES_OK where it does not accept the features")
@pytest.mark.parametrize("feature", NOT_OFFERED.values(), ids=NOT_OFFERED)
def test_a_feature_that_is_not_offered_is_refused(driver: Driver, feature: int) -> None:
    """VIRTIO 1.2 "Feature Bits"."""
    driver.write(MMIO.STATUS, ACKNOWLEDGED)
    driver.accept(ALL | feature)
    driver.write(MMIO.STATUS, NEGOTIATED)
    assert driver.status == ACKNOWLEDGED
    assert driver.misuse == ["a feature is accepted that is not offered"]


@clause("Feature Bits", "fail to set FEATURES_OK where it does not accept the features")
def test_a_legacy_driver_is_refused(driver: Driver) -> None:
    """VIRTIO 1.2 "Feature Bits" and "Reserved Feature Bits"."""
    driver.write(MMIO.STATUS, ACKNOWLEDGED)
    driver.accept(ALL & ~F.VERSION_1)
    driver.write(MMIO.STATUS, NEGOTIATED)
    assert driver.status == ACKNOWLEDGED
    assert driver.misuse == ["VIRTIO_F_VERSION_1 is not accepted: this is no legacy device"]


def test_after_a_refusal_fewer_features_may_be_accepted(driver: Driver) -> None:
    driver.write(MMIO.STATUS, ACKNOWLEDGED)
    for features, expected in ((ALL | F.RING_PACKED, ACKNOWLEDGED), (ALL, NEGOTIATED)):
        driver.accept(features)
        driver.write(MMIO.STATUS, NEGOTIATED)
        assert driver.status == expected


@clause("Feature Bits", "refuse, after a reset, features that it has once agreed on")
@pytest.mark.parametrize("features", [PLAIN, ALL, PLAIN | F.EVENT_IDX], ids=str)
def test_features_that_were_accepted_once_are_accepted_again(driver: Driver, features: int) -> None:
    """VIRTIO 1.2 "Feature Bits"."""
    for _ in range(3):
        driver.go_live(features)
        assert driver.status == LIVE


@pytest.mark.parametrize(("accepted", "slot"), [(True, "avail_event"), (False, "used_flags")])
def test_a_feature_that_was_not_accepted_is_not_used(driver: Driver, accepted: bool, slot: str) -> None:
    """VIRTIO_F_EVENT_IDX decides where the device says that it wants to be notified."""
    driver.go_live(PLAIN | (F.EVENT_IDX if accepted else 0))
    queue = driver.queue(1)
    driver.poke16(queue.device_gpa, 0x5AA5)
    driver.poke16(queue.device_gpa + 4 + 8 * queue.size, 0x5AA5)
    queue.send(driver.readable(b"."))
    changed = {name for name in ("avail_event", "used_flags") if getattr(queue, name) != 0x5AA5}
    assert changed == {slot}
