"""Read a run: the sentences and the metrics of its log, and the page that `rlloss report` makes of it.

RUN_DIR is the output folder of a run with TRL, best with `token_log_steps`, which writes the completions token by
token. Without one the script makes a short run first, that of trl_grpo.py. Run it with

    python examples/read_run.py [RUN_DIR]

`read_run` gives you the same numbers for plots and checks of your own.
"""

import sys
from pathlib import Path

from rlloss.report.findings import found_in, start_and_end
from rlloss.report.run_log import count, read_run
from rlloss.report.run_report import write_run_report

SHOWN = ("reward", "entropy", "rlloss/live_share", "clip_ratio/high_mean", "grad_norm")


def main(run_dir="runs/read_run"):
    if not Path(run_dir).exists():
        import trl_grpo  # beside this file

        trl_grpo.main(run_dir)

    run = read_run(Path(run_dir))
    print(f"\n{run_dir}:")
    for sentence in found_in(run):  # from the metrics, and what the collapse monitor warned of
        print(f"- {sentence}")

    print("\nMeans over the first and the last tenth of the run:")
    for name in SHOWN:
        ends = start_and_end(run.metrics.get(name, {}))  # {step: value}
        if ends is not None:
            print(f"  {name:<24}{ends[0]:10.4f}{ends[1]:10.4f}")

    if run.completions:
        counts = count(run, top=5)
        texts = list(run.texts)
        print(f"\n{len(run.completions)} completions, {counts.live} of {counts.tokens} tokens with a gradient.")
        print("Tokens of highest entropy (nats, share with a gradient):")
        for token, occurrences, nats, live_share in counts.rows:
            print(f"  {texts[token]!r:<10}{occurrences:6} times{nats:8.3f}{live_share:8.0%}")

    print(f"\nPage: {write_run_report(run_dir)}")  # opens offline


if __name__ == "__main__":
    main(*sys.argv[1:])
