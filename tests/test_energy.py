"""A card's energy: what NVML says, in joules, and nothing where it says nothing."""

import ctypes

import pytest

from gambeson import energy


class Library:
    """NVML with one card, whose counter stands at 12,345,678 millijoules."""

    def __init__(self, fails=""):
        self.fails, self.asked = fails, []

    def nvmlInit_v2(self):
        return int(self.fails == "init")

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        self.asked.append(uuid)
        ctypes.cast(handle, ctypes.POINTER(ctypes.c_void_p))[0] = 7
        return int(self.fails == "handle")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, count):
        self.asked.append(handle.value)
        ctypes.cast(count, ctypes.POINTER(ctypes.c_ulonglong))[0] = 12_345_678
        return 3 if self.fails == "count" else 0  # 3: not supported


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(energy, "_uuid", lambda device: "abc")


def test_the_counter_is_told_in_joules(card):
    nvml = Library()
    assert energy.joules_so_far("cuda:0", nvml) == 12_345.678
    assert nvml.asked == [b"GPU-abc", 7]


@pytest.mark.parametrize("fails", ["init", "handle", "count"])
def test_a_card_that_does_not_report_has_no_number(card, fails):
    assert energy.joules_so_far("cuda:0", Library(fails)) is None


def test_no_library_no_number(card, monkeypatch):
    monkeypatch.setattr(energy, "LIBRARY", "libthere-is-none.so")
    assert energy.joules_so_far("cuda", None) is None


def test_a_processor_has_no_number():
    assert energy.joules_so_far("cpu", Library()) is None
    assert energy.used("cpu", 3.0) == {}


def test_what_was_used_is_the_difference(monkeypatch):
    monkeypatch.setattr(energy, "joules_so_far", lambda device: 50.0)
    assert energy.used("cuda", 20.0) == {"joules": 30.0}
    assert energy.used("cuda", None) == {}
