#!/usr/bin/env bash
# llvmlite 0.50.0
#
# Module.link_in takes a linkonce_odr function only if the module it is linked into refers to it by then.  What is
# linked before its caller is dropped without a word, and the object code lacks the function: nothing complains
# before that is loaded.  So callers have to be linked before what they call.
#
# Seen (what the object code of `caller` refers to but does not have):
#   caller, then callee: nothing
#   callee, then caller: callee
set -euo pipefail

dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
python3 -m venv v
v/bin/pip install -qq --disable-pip-version-check llvmlite==0.50.0

v/bin/python - <<'PYTHON'
import llvmlite.binding as llvm

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
CALLEE = """
define linkonce_odr i64 @callee(i64 %x) {
  %y = add i64 %x, 1
  ret i64 %y
}
"""
CALLER = """
declare i64 @callee(i64)
define i64 @caller(i64 %x) {
  %y = call i64 @callee(i64 %x)
  ret i64 %y
}
"""


def missing(*parts):
    module = llvm.parse_assembly("")
    for part in parts:
        module.link_in(llvm.parse_assembly(part))
    module.verify()
    return [f.name for f in module.functions if f.is_declaration]


for name, parts, expected in (
    ("caller, then callee", (CALLER, CALLEE), []),
    ("callee, then caller", (CALLEE, CALLER), ["callee"]),
):
    found = missing(*parts)
    print(f"{name}: {' '.join(found) or 'nothing'}")
    assert found == expected
PYTHON
