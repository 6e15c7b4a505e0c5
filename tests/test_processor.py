"""What code is compiled for: by the machine, its features, its maker, or a name."""

import sys

import pytest

from favor_np.cpu.processor import find_target, named_target, target_of

V3 = frozenset(["avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe"])
V4 = V3 | {"avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"}
AMX = V4 | {"avx512bf16", "amx-tile", "amx-bf16"}


@pytest.mark.parametrize(
    ("features", "level", "isa"),
    [
        (V4, "x86-64-v4", "avx512"),
        (V4 | {"sha", "avx512bf16"}, "x86-64-v4", "avx512"),
        (V4 - {"avx512bw"}, "x86-64-v3", "avx2"),  # Xeon Phi
        (V3, "x86-64-v3", "avx2"),
        (V3 - {"fma"}, "x86-64", "plain"),
        (frozenset(), "x86-64", "plain"),
    ],
)
def test_levels(features, level, isa):
    """All that a level has must be there: code of a higher one would end the process."""
    target = target_of(features)
    assert (target.level, target.isa) == (level, isa)
    assert target.cpu == level


@pytest.mark.parametrize(
    ("features", "vendor", "way"),
    [
        (V4 | {"avx512bf16"}, "AuthenticAMD", "dots"),  # Zen 4
        (V4 | {"avx512bf16"}, "GenuineIntel", "plain"),  # AMX hidden: float32 is as fast
        (V4 | {"avx512bf16"}, "", "plain"),
        (V4, "AuthenticAMD", "plain"),
        (AMX, "GenuineIntel", "amx" if sys.platform == "linux" else "plain"),
        (AMX - {"amx-bf16"}, "GenuineIntel", "plain"),
        (V3 | {"avx512bf16"}, "AuthenticAMD", "plain"),
    ],
)
def test_who_multiplies_bfloat16_faster_than_float32(features, vendor, way):
    assert target_of(features, vendor).way == way


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_every_64_bit_arm_has_neon(machine, system):
    """Whatever LLVM reports: on a Mac it reports nothing."""
    target = find_target({}, machine, system)
    assert (target.level, target.isa, target.features, target.way) == (
        "aarch64",
        "neon",
        "+neon",
        "plain",
    )
    assert target.cpu == ("apple-m1" if system == "darwin" else "generic")
    named = find_target({"NUMBA_CPU_NAME": "neoverse-n1"}, machine, system)
    assert (named.cpu, named.isa) == ("neoverse-n1", "neon")


@pytest.mark.parametrize(
    ("name", "isa", "way"),
    [
        ("znver4", "avx512", "dots"),
        ("znver3", "avx2", "plain"),
        ("cooperlake", "avx512", "plain"),
        ("skylake-avx512", "avx512", "plain"),
        ("skylake", "avx2", "plain"),
        ("haswell", "avx2", "plain"),
        ("nehalem", "plain", "plain"),
        ("x86-64", "plain", "plain"),
        ("x86-64-v3", "avx2", "plain"),
        ("x86-64-v4", "avx512", "plain"),
    ],
)
def test_names(name, isa, way):
    target = named_target(name, "", "x86_64")
    assert (target.cpu, target.isa, target.way) == (name, isa, way)


def test_features_besides_a_name():
    """As for Numba; without a name they are besides that of the processor."""
    both = {"NUMBA_CPU_NAME": "x86-64-v4", "NUMBA_CPU_FEATURES": "+avx512bf16"}
    assert find_target(both, "x86_64").way == "dots"
    assert named_target("znver4", "-avx512bf16", "x86_64").way == "plain"
    alone = find_target({"NUMBA_CPU_FEATURES": "+sse4.2"})
    assert alone.features.endswith("+sse4.2")
    assert alone.cpu not in ("", "host")
    assert find_target({"NUMBA_CPU_NAME": "host"}) == find_target({})


def test_features_of_a_way():
    """Code that does not multiply pairs needs nothing of what multiplies them."""
    target = target_of(AMX, "GenuineIntel")
    assert "bf16" not in target.features_for("")
    assert target.features_for("dots").endswith("+avx512bf16")
    assert target.features_for("amx").endswith("+avx512bf16,+amx-tile,+amx-bf16")
    assert target_of(V3).features_for("amx") == target_of(V3).features
