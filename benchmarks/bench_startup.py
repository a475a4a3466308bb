"""CPU seconds until the command line answers, and for the whole demo: ``python -m benchmarks.bench_startup``."""

import os
import statistics
import subprocess
import sys
import tempfile


def cpu_and_wall(command: list[str]) -> tuple[float, float]:
    before, started = os.times(), os.times().elapsed
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, after.elapsed - started


def main() -> None:
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import trimtab": [sys.executable, "-c", "import trimtab"],
        "trimtab --help": [sys.executable, "-m", "trimtab", "--help"],
    }
    print(f"{'command':<16} {'CPU s':>7} {'wall s':>7}   goal (CPU)")
    for name, command in commands.items():
        cpu_and_wall(command)
        cpu, wall = (statistics.median(x) for x in zip(*(cpu_and_wall(command) for _ in range(5))))
        print(f"{name:<16} {cpu:7.2f} {wall:7.2f}   {'< 0.3 s' if 'trimtab' in name else ''}")
    with tempfile.TemporaryDirectory() as out:
        cpu, wall = cpu_and_wall([sys.executable, "-m", "trimtab", "demo", "-q", "-o", out])
    print(f"{'trimtab demo':<16} {cpu:7.1f} {wall:7.1f}   wall < 90 s")


if __name__ == "__main__":
    main()
