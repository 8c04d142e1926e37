"""The benchmark of the loader runs, in small."""

from benchmarks import loader


def test_the_benchmark_of_the_loader_compares_the_same_images(capsys, monkeypatch):
    monkeypatch.setattr(loader, "LARGE", (96, 72))
    cases = [
        case._replace(source=loader.LARGE, size=48) if case.name == "1 megapixel" else case for case in loader.CASES
    ]
    monkeypatch.setattr(loader, "CASES", [*cases[:1], cases[2], cases[-1]])
    loader.main(["--images", "16", "--batch", "2", "--batches", "1", "--workers", "0", "--pairs", "1", "--all"])
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["64", "1", "1"]
    assert all(int(line.partition(";")[0].split()[-1]) <= 2 for line in lines)  # levels
