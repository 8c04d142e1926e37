"""The benchmark of sampling runs, in small."""

from benchmarks import sampling


def test_the_bare_loop_of_the_benchmark_makes_the_pipeline_s_pictures(capsys):
    sampling.main(["--pictures", "2", "--steps", "3", "--pairs", "1", "--size", "32"])
    first, *_ = capsys.readouterr().out.splitlines()[1:]
    number, ours, theirs, ratio, levels = first.split()
    assert (number, int(levels) <= 1) == ("1", True)
    assert float(ratio) > 0 and abs(float(ratio) - float(ours) / float(theirs)) < 0.1
