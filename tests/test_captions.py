"""Captions as people have them: encodings, several in a file, other endings, json, tables, names."""

import json
import os
from pathlib import Path

import pytest
from data_sets import encoded, keys, module, take

from ldm_lab.config import build
from ldm_lab.data.captions import Captions
from ldm_lab.data.tar import write_shard
from ldm_lab.data.text import decode_text
from ldm_lab.errors import UserError

CASES = Path(__file__).parent / "data" / "cases"
NOT_UTF8 = "caption is not UTF-8 (data.captions.encoding names its encoding)"


def texts(section: dict, epochs: int = 1, **options) -> dict[str, str]:
    """Return key -> caption of the last epoch."""
    batches = take(module({"batch_size": 1, **section, **options}, epochs=epochs))
    return {key: text for batch in batches for key, text in zip(batch.key, batch.text)}


def folder(root: Path, **files: str | bytes) -> dict:
    """Write images a.png, b.png, ... and files beside them; `a_txt="..."` is a.txt. Return the section."""
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return {"name": "folder", "path": str(root)}


PNG = encoded(1)

# ----------------------------------------------------------------------------------------------------------- encodings

TEXT = "un café, 猫 🐈"


@pytest.mark.parametrize("name", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_says_how_a_caption_is_read(name):
    mark = {"utf-16-be": b"\xfe\xff", "utf-32-be": b"\0\0\xfe\xff"}.get(name, b"")
    assert decode_text(mark + TEXT.encode(name)) == TEXT
    assert decode_text(mark + TEXT.encode(name), "cp1252") == TEXT
    assert decode_text(("\ufeff\ufeff" + TEXT + "\ufeff").encode()) == TEXT, "files put together"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("café", "latin-1"), ("“café” – 5 €", "cp1252"), ("猫が座る", "cp932"), ("一只猫", "gb18030"),
        ("кот", "koi8-r"), ("a cat", "utf-16-le"), ("a cat", "utf-16-be"), ("猫猫", "utf-16-le"),
        ("猫が座る", "iso2022_jp"),
        ("고양이", "cp949"), ("a cat", "utf-32-le"),
    ],
)  # fmt: skip
def test_what_is_not_utf8_needs_the_name_of_its_encoding(text, name):
    data = text.encode(name)
    if name != "iso2022_jp" and text not in ("猫猫", "一只猫"):  # whose bytes are valid UTF-8 of another text
        assert decode_text(data) is None
    assert decode_text(data, name) == text
    if name not in ("utf-16-le", "utf-16-be", "iso2022_jp", "utf-32-le"):
        assert decode_text("naïve ✓".encode(), name) == "naïve ✓", "a folder of both"


def test_the_case_of_utf16(tmp_path):
    section = folder(tmp_path, a_png=PNG, a_txt=(CASES / "captions" / "caption_utf16.txt").read_bytes())
    assert texts(section, require_text=True) == {"a.png": "a café by the sea"}


@pytest.mark.parametrize("kind", ["folder", "shard", "list", "json", "metadata"])
def test_a_caption_in_another_encoding_is_counted_and_read_where_it_is_named(tmp_path, kind, capsys):
    cafe = "un café".encode("latin-1")
    section = folder(tmp_path, a_png=PNG, b_png=PNG)
    if kind == "folder":
        folder(tmp_path, a_txt=cafe, b_txt="deux")
    elif kind == "shard":
        write_shard(tmp_path / "0.tar", [("a", {"png": PNG, "txt": cafe}), ("b", {"png": PNG, "txt": b"deux"})])
        section = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    elif kind == "list":
        (tmp_path / "list.txt").write_bytes(b"a.png\t" + cafe + b"\nb.png\tdeux\n")
        section = {"name": "image_list", "path": str(tmp_path / "list.txt")}
    elif kind == "json":
        folder(tmp_path, a_json=b'{"caption": "' + cafe + b'"}', b_json='{"caption": "deux"}')
    else:
        folder(tmp_path, metadata_csv=b"file_name,text\na.png," + cafe + b"\nb.png,deux\n")
        with pytest.raises(UserError, match=r"metadata\.csv is not UTF-8: set data\.captions\.encoding"):
            texts(section, captions={"metadata": "metadata.csv"})
        got = texts(section, captions={"metadata": "metadata.csv", "encoding": "latin-1"})
        assert set(got.values()) == {"un café", "deux"}
        return
    data = module({"batch_size": 1, **section}, epochs=1)
    assert sorted(t for batch in take(data) for t in batch.text) == ["", "deux"]
    assert f"{NOT_UTF8} 1 (e.g. a" in data.summary()
    assert f"captions looked at: {NOT_UTF8} (e.g. a" in capsys.readouterr().out or kind == "shard"
    data = module({"batch_size": 1, **section, "require_text": True, "max_skipped": 0.9}, epochs=1)
    assert len(take(data)) == 1 and dict(data.skipped) == {NOT_UTF8: 1}
    assert set(texts(section, captions={"encoding": "latin-1"}).values()) == {"un café", "deux"}


def test_wrong_options_of_captions():
    def told(**captions) -> str:
        with pytest.raises(UserError) as error:
            build("data", {"name": "folder", "path": "x", "image_size": 8, "batch_size": 1, "captions": captions})
        return str(error.value)

    assert "data.captions.encoding: 'latin-99' is no encoding of texts" in told(encoding="latin-99")
    assert "'hex' is no encoding of texts" in told(encoding="hex")
    assert "data.captions.column: of which table?" in told(column="text")
    assert "data.captions.source: folder is the only place then" in told(source="folder", endings=".txt")
    assert "data.captions.pattern: '[': unterminated" in told(source="file_name", pattern="[")
    assert "has no group" in told(source="file_name", pattern="x")
    assert "Did you mean 'endings'?" in told(ending=".txt")
    for nothing in ([], "", [".txt", ""]):
        assert "data.captions.endings: one at least is needed" in told(endings=nothing)


# ------------------------------------------------------------------------------------------------------------- several


@pytest.mark.parametrize("kind", ["folder", "shard", "json"])
def test_of_several_captions_each_epoch_draws_one(tmp_path, kind, capsys):
    """As COCO's are kept: five in a file, one a line. A resumed run draws the same."""
    lines = [f"caption {n}" for n in range(5)]
    text = "\r\n".join(lines).encode() + b"\r\n\r\n"
    section = folder(tmp_path, a_png=PNG)
    if kind == "folder":
        folder(tmp_path, a_txt=text)
    elif kind == "json":
        folder(tmp_path, a_json=json.dumps({"captions": lines}))
        section["captions"] = {"json_key": "captions"}
    else:
        write_shard(tmp_path / "0.tar", [("a", {"png": PNG, "txt": text})])
        section = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    section = {**section, "batch_size": 1}
    drawn = [batch.text[0] for batch in take(module(section, epochs=40))]
    assert set(drawn) == set(lines)
    assert "1 of 1 captions looked at are several (a" in capsys.readouterr().out
    first = module(section, epochs=40)
    take(first, 7)
    second = module(section, epochs=40)
    second.load_rank_states([first.rank_state()], 0)
    assert [batch.text[0] for batch in take(second)] == drawn[7:]
    if kind == "folder":
        (one,) = texts(section, captions={"lines": "one"}).values()
        assert one == text.decode().strip()


def test_a_text_of_several_lines_is_one_caption_where_the_json_says_so(tmp_path):
    """img2dataset writes a web page's caption as it was, and the same into the json."""
    text = "a tall one,\nsecond line"
    parts = {"png": PNG, "txt": text.encode(), "json": json.dumps({"caption": text}).encode()}
    write_shard(tmp_path / "0.tar", [("a", parts)])
    section = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    assert texts(section) == {"a": text}
    assert texts(section, captions={"lines": "each"})["a"] in text.split("\n")
    folder(tmp_path / "files", a_png=PNG, a_txt=text, a_json=json.dumps({"caption": text}))
    assert texts({"name": "folder", "path": str(tmp_path / "files")}) == {"a.png": text}


# -------------------------------------------------------------------------------------------------------------- places


def test_endings_of_caption_files(tmp_path, capsys):
    section = folder(tmp_path, a_png=PNG, a_caption="of a", b_png=PNG)
    (tmp_path / "b.png.txt").write_text("of b")
    (tmp_path / "C.JPG").write_bytes(encoded(3, kind="jpeg"))
    (tmp_path / "C.TXT").write_text("of c")
    assert texts(section) == {"a.png": "", "b.png": "", "C.JPG": "of c"}
    out = capsys.readouterr().out
    assert "3 images; captions: 1 .txt, 2 images without" in out
    assert "1 files photo.caption beside images are not read: data.captions.endings=.caption reads them" in out
    assert "1 files photo.jpg.txt beside images are not read: data.captions.endings=.*.txt reads them" in out
    got = texts(section, captions={"endings": [".caption", ".*.txt", ".txt"]})
    assert got == {"a.png": "of a", "b.png": "of b", "C.JPG": "of c"}
    assert texts(section, captions={"endings": "caption"})["a.png"] == "of a"
    with pytest.raises(UserError, match=r"none of the 2 images has a caption.*data\.captions\.endings=\.caption"):
        (tmp_path / "C.JPG").unlink()
        texts(section, require_text=True)


def test_endings_of_caption_files_in_shards(tmp_path):
    parts = {"png": PNG, "caption": b"short", "jpg.txt": b"no", "png.txt": b"long"}
    write_shard(tmp_path / "0.tar", [("a", parts)])
    section = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    assert texts(section) == {"a": ""}
    assert texts(section, captions={"endings": [".caption", ".txt"]}) == {"a": "short"}
    assert texts(section, captions={"endings": [".png.txt"]}) == {"a": "long"}
    assert texts(section, captions={"endings": [".*.txt"]})["a"] in ("long", "no")


@pytest.mark.parametrize("in_shard", [False, True])
@pytest.mark.parametrize(
    ("key", "content", "wanted"),
    [
        ("blip", {"blip": " a cat "}, {"a cat"}),
        ("blip.long", {"blip": {"long": "a long cat"}}, {"a long cat"}),
        ("blip.long", {"blip.long": "a dotted cat"}, {"a dotted cat"}),
        ("all", {"all": ["one", "two", ""]}, {"one", "two"}),
        ("all.text", {"all": [{"text": "one"}, {"text": "two"}, {"other": 1}]}, {"one", "two"}),
        ("blip", {"caption": "another"}, {""}),
        ("blip", {"blip": "half \ud83d"}, {"half \ufffd"}),
    ],
)
def test_json_keys(tmp_path, in_shard, key, content, wanted):
    data = json.dumps(content).encode()
    section = folder(tmp_path / "files", a_png=PNG, a_json=data, a_txt="the alt text")
    if in_shard:
        write_shard(tmp_path / "0.tar", [("a", {"png": PNG, "txt": b"the alt text", "json": data})])
        section = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    batches = take(module({"batch_size": 1, **section, "captions": {"json_key": key}}, epochs=8))
    assert {text for batch in batches for text in batch.text} == wanted
    both = {"json_key": key, "endings": [".txt"]}
    if wanted != {""}:
        assert set(texts(section, captions=both).values()) <= wanted


def test_captions_in_json_alone_are_pointed_out(capsys):
    section = {"name": "webdataset", "shards": str(CASES / "shards" / "jsononly.tar")}
    assert set(texts(section).values()) == {""}
    out = capsys.readouterr().out
    assert (
        "jsononly.tar: 24 images, with 24 .json" in out and "captions of the first 24 samples: none; 24 without" in out
    )
    assert "has 'caption': data.captions.json_key=caption takes the captions from it" in out
    data = module({**section, "captions": {"json_key": "caption"}, "require_text": True}, epochs=1)
    assert sorted(text for batch in take(data) for text in batch.text) == sorted(f"cap {n}" for n in range(24))
    assert data.summary().endswith("none skipped; captions: .json (caption) 24")


TABLES = {
    "metadata.jsonl": '{"file_name": "a.png", "text": "of a"}\n{"file_name": "sub/b.png", "text": ["b 1", "b 2"]}\n\n',
    "metadata.csv": 'file_name,text,other\na.png,"of a",x\n./sub/b.png,b 1,y\nsub/b.png,b 2,z\ngone.png,c,\nd.png,,\n',
    "metadata.tsv": "image\tcaption\na.png\tof a\nsub\\b.png\tb 1\nsub/b.png\tb 2\n",
    "semicolons.csv": "\ufefffile_name;text\r\na.png;of a\r\nsub/b.png;b 1\r\nsub/b.png;b 2\r\n",
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_tables_of_captions(tmp_path, name, encoding):
    section = folder(tmp_path, a_png=PNG, sub__b_png=PNG, c_png=PNG)
    (tmp_path / name).write_bytes(TABLES[name].lstrip("\ufeff" if encoding == "utf-16" else "").encode(encoding))
    captions = {"metadata": name}
    got = [texts(section, epochs=epochs, captions=captions) for epochs in range(1, 9)]
    assert {its["a.png"] for its in got} == {"of a"} and {its["c.png"] for its in got} == {""}
    assert {its["sub/b.png"] for its in got} == {"b 1", "b 2"}
    assert len(texts(section, captions=captions, require_text=True)) == 2


def test_a_table_in_each_folder_of_parquet_or_for_shards(tmp_path, capsys):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    section = folder(tmp_path, train__a_png=PNG, test__a_png=PNG)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png,train a\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,text\na.png,test a\n")
    assert texts(section) == {"train/a.png": "", "test/a.png": ""}
    assert "data.captions.metadata=metadata.csv takes the captions from it" in capsys.readouterr().out
    got = texts(section, captions={"metadata": "metadata.csv"})
    assert got == {"train/a.png": "train a", "test/a.png": "test a"}
    rows = {"key": ["00007", "00008"], "blip": [["one"], ["two"]], "score": [1.0, 2.0]}
    pq.write_table(pa.table(rows), tmp_path / "captions.parquet")
    write_shard(tmp_path / "0.tar", [("00007", {"png": PNG, "txt": b"alt"}), ("00008", {"png": PNG})])
    shards = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    captions = {"metadata": str(tmp_path / "captions.parquet"), "column": "blip"}
    assert texts(shards, captions=captions) == {"00007": "one", "00008": "two"}
    with pytest.raises(UserError, match=r"data\.captions\.column: has to be given: which column .* key, blip"):
        texts(shards, captions={"metadata": str(tmp_path / "captions.parquet")})
    with pytest.raises(UserError, match=r"no such column: 'blipp'.*Did you mean 'blip'"):
        texts(shards, captions={**captions, "column": "blipp"})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.csv", None, "no gone.csv in "),
        ("x.csv", "a,b\n1,2\n", r"none of its columns \(a, b\) says which image"),
        ("x.jsonl", '{"file_name": "a.png", "text": "x"}\n{"fi', "x.jsonl, line 2: not JSON"),
        ("x.jsonl", "[1]\n", r"line 1: \{\.\.\.\} is needed"),
        ("x.xlsx", "", r"one of \.jsonl, .*\.parquet is needed"),
        ("x.parquet", "PAR1", "not a readable Parquet file"),
    ],
)
def test_tables_that_are_none(tmp_path, name, content, told):
    section = folder(tmp_path, a_png=PNG)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=told):
        texts(section, captions={"metadata": name})


def test_rows_of_a_table_that_give_nothing_are_said(tmp_path, capsys):
    section = folder(tmp_path, a_png=PNG, b_png=PNG, c_png=PNG)
    rows = f"file_name,text\n{tmp_path}/a.png,of a\nb.png,of b, with a comma\nc.png,of c,\nC:\\x\\a.png,x\n"
    (tmp_path / "x.csv").write_text(rows)
    assert texts(section, captions={"metadata": "x.csv"}) == {"a.png": "of a", "b.png": "", "c.png": "of c"}
    said = capsys.readouterr().out
    assert "x.csv: 1 rows have more cells than the first line has columns" in said
    assert "x.csv: 1 rows are of images that are not here (e.g. C:\\x\\a.png)" in said
    (tmp_path / "x.csv").write_text('file_name,text\na.png,"never closed\nb.png,of b\n')
    with pytest.raises(UserError, match=r"x\.csv: a quote is opened and never closed: a\.png"):
        texts(section, captions={"metadata": "x.csv"})
    (tmp_path / "x.csv").write_text('file_name,text\na.png,5" tall\nb.png,"two\nlines"\n')
    assert texts(section, captions={"metadata": "x.csv"}) == {"a.png": '5" tall', "b.png": "two\nlines", "c.png": ""}


def test_captions_in_names(tmp_path):
    section = folder(tmp_path, **{"dogs__0012_a_red_dog_png": PNG})
    (tmp_path / "dogs" / "0012.a_red_dog_png").rename(tmp_path / "dogs" / "0012_a_red_dog.png")
    assert texts(section, captions={"source": "file_name"}) == {"dogs/0012_a_red_dog.png": "0012 a red dog"}
    named = {"source": "file_name", "pattern": r"^\d+_(.*)$"}
    assert texts(section, captions=named) == {"dogs/0012_a_red_dog.png": "a red dog"}
    assert texts(section, captions={"source": "folder"}) == {"dogs/0012_a_red_dog.png": "dogs"}
    write_shard(tmp_path / "0.tar", [("cats/a_small_cat", {"png": PNG})])
    shards = {"name": "webdataset", "shards": str(tmp_path / "0.tar")}
    assert texts(shards, captions={"source": "file_name"}) == {"cats/a_small_cat": "a small cat"}
    assert texts(shards, captions={"source": "folder"}) == {"cats/a_small_cat": "cats"}


def test_names_with_accents_in_both_forms(tmp_path):
    """macOS takes letters and accents apart; a caption from another system has them together."""
    (tmp_path / "cafe\u0301.png").write_bytes(PNG)
    (tmp_path / "caf\xe9.txt").write_text("a coffee")
    (tmp_path / "na\xefve.png").write_bytes(PNG)
    (tmp_path / "nai\u0308ve.txt").write_text("naive art")
    got = texts({"name": "folder", "path": str(tmp_path)}, require_text=True)
    assert sorted(got.values()) == ["a coffee", "naive art"]
    (tmp_path / "list.csv").write_text("caf\xe9.png\nnai\u0308ve.png\n")
    got = texts({"name": "image_list", "path": str(tmp_path / "list.csv")}, require_text=True)
    assert sorted(got.values()) == ["a coffee", "naive art"]
    (tmp_path / "x.csv").write_text("file_name,text\ncaf\xe9.png,one\nnai\u0308ve.png,two\n")
    got = texts({"name": "folder", "path": str(tmp_path), "captions": {"metadata": "x.csv"}})
    assert sorted(got.values()) == ["one", "two"]


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsencode(str(tmp_path)) + b"/caf\xe9"
    try:
        with open(name + b".png", "wb") as file:
            file.write(PNG)
    except OSError:
        pytest.skip("the file system takes no such name")
    with open(name + b".txt", "wb") as file:
        file.write(b"a coffee")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\n")
    for section in ({"name": "folder", "path": str(tmp_path)},
                    {"name": "image_list", "path": str(tmp_path / "list.txt")}):  # fmt: skip
        data = module({"batch_size": 1, **section}, epochs=1)
        assert [text for batch in take(data) for text in batch.text] == ["a coffee"]
        assert str(data.summary().encode())
    section = {"name": "folder", "path": str(tmp_path), "captions": {"source": "file_name"}}
    data = module({"batch_size": 1, **section}, epochs=1)
    take(data)
    assert NOT_UTF8 in data.summary()
    section["captions"] = {"source": "file_name", "encoding": "latin-1"}
    assert list(texts(section).values()) == ["café"]


def test_captions_by_hand():
    assert Captions(endings="txt").endings == (".txt",)
    found = Captions().find("x", {".txt": b" \n ", ".json": b"{}"}.get)
    assert found.exists and not found.texts


# ---------------------------------------------------------------------------------------------------------------- lists


def test_lists_as_people_write_them(tmp_path, monkeypatch, capsys):
    names = ["a.png", "b c.png", "d.png", "~e.png", "#f.png", "g%20h.png", "i j.png", "k.png"]
    for name in names:
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "m.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("beside a")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    lines = [
        "# a comment", "a.png", '"b c.png"', "'d.png'\tthe letter d", "#f.png", f"file://{tmp_path}/i%20j.png",
        "~/m.png", "", "./k.png \t of k ", f"{tmp_path}/g%20h.png", "  # another", "gone.png",
    ]  # fmt: skip
    (tmp_path / "list.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    data = module({"name": "image_list", "path": str(tmp_path / "list.txt"), "max_skipped": 0.5}, epochs=1)
    batches = take(data)
    got = dict(zip(keys(batches), (text for batch in batches for text in batch.text)))
    assert got == {
        "a.png": "beside a", "b c.png": "", "d.png": "the letter d", "#f.png": "", f"{tmp_path}/i j.png": "",
        f"{tmp_path}/home/m.png": "", "./k.png": "of k", f"{tmp_path}/g%20h.png": "",
    }  # fmt: skip
    assert dict(data.skipped) == {"missing file": 1}
    out = capsys.readouterr().out
    assert f"1 files of the list are missing (e.g. gone.png in {tmp_path}, the list's folder)" in out
    assert "2 lines of the list begin with #" in out
    assert "captions: 2 list, 1 .txt, 6 images without" in out


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_in_other_encodings_and_line_ends(tmp_path, end):
    (tmp_path / "é.png").write_bytes(PNG)
    (tmp_path / "b.png").write_bytes(PNG)
    (tmp_path / "list.txt").write_bytes(f"é.png\tun café{end}b.png{end}".encode("utf-16"))
    got = texts({"name": "image_list", "path": str(tmp_path / "list.txt"), "limit": 2})
    assert got == {"é.png": "un café", "b.png": ""}
    assert texts({"name": "image_list", "path": str(tmp_path / "list.txt"), "limit": 1}) == {"é.png": "un café"}
    (tmp_path / "list.txt").write_text("https://host/a.jpg\n")
    with pytest.raises(UserError, match="a list is of files on this machine"):
        module({"name": "image_list", "path": str(tmp_path / "list.txt")})


# ------------------------------------------------------------------------------------------------------ what was found


def test_what_was_found_in_a_folder(tmp_path, capsys):
    folder(tmp_path, a_png=PNG, a_txt="of a", a_psd=b"x", b_png=PNG, readme="x", c_mp4=b"x", d_mp4=b"x")
    folder(tmp_path, sub__e_png=PNG, sub__e_json='{"caption": "of e"}')
    for name in (".hidden.png", "._a.png", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "f.png").write_bytes(PNG)
    (tmp_path / "10_dog").mkdir()
    (tmp_path / "10_dog" / "g.png").write_bytes(PNG)
    outside = tmp_path.parent / f"{tmp_path.name} outside"
    folder(outside, h_png=PNG)
    (tmp_path / "link").symlink_to(outside)
    (outside / "back").symlink_to(tmp_path)
    (tmp_path / "sub" / "again").symlink_to(tmp_path / "sub")
    data = module({"name": "folder", "path": str(tmp_path), "batch_size": 1}, epochs=1)
    assert sorted(keys(take(data))) == ["10_dog/g.png", "a.png", "b.png", "link/h.png", "sub/e.png"]
    out = capsys.readouterr().out
    assert f"data: {tmp_path}: 5 images; captions: 1 .json (caption), 1 .txt, 3 images without" in out or (
        f"data: {tmp_path}: 5 images; captions: 1 .txt, 1 .json (caption), 3 images without" in out
    )
    assert "data: left out: 2 .mp4, 1 without an ending, 1 .psd, 4 hidden" in out
    assert "data: 1 symbolic links to folders followed" in out
    assert "data: 2 symbolic links to folders that are visited anyway, left out (e.g. " in out
    assert "folders such as 10_dog: the number is no repeat here" in out
    data.setup()
    assert "data:" not in capsys.readouterr().out, "once"


def test_images_that_need_a_package_are_named_at_the_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ldm_lab.data.folders.find_spec", lambda name: None)
    module(folder(tmp_path, a_png=PNG, b_heic=b"x", c_jxl=b"x"))
    assert (
        "1 .heic, 1 .jxl need make setup EXTRAS=images, or pip install -e '.[images]', and are skipped without it"
        in capsys.readouterr().out
    )


def test_class_folders_one_level_too_high(tmp_path, capsys):
    for n, breed in enumerate(("n02085620-Chihuahua", "n02105412-flat-coated_retriever")):
        (tmp_path / "Images" / breed).mkdir(parents=True)
        (tmp_path / "Images" / breed / f"{n}.png").write_bytes(PNG)
    section = {"name": "class_folders", "path": str(tmp_path)}
    with pytest.raises(
        UserError, match=r"data\.level=last .*Chihuahua, flat-coated retriever, .*data\.level=first .*\(Im"
    ):
        texts(section)
    assert set(texts(section, level="last").values()) == {"Chihuahua", "flat-coated retriever"}
    assert "2 classes: Chihuahua 1, flat-coated retriever 1" in capsys.readouterr().out
    assert set(texts(section, level="first").values()) == {"Images"}
    assert set(texts({**section, "path": f"{tmp_path}/Images"}).values()) == {"Chihuahua", "flat-coated retriever"}
    with pytest.raises(UserError, match="captions are the names of the folders here"):
        texts(section, captions={"endings": ".txt"})


def test_a_folder_of_json_without_the_key_is_pointed_out(tmp_path, capsys):
    module({**folder(tmp_path, a_png=PNG, a_json="{}"), "captions": {"json_key": "blip"}})
    assert "1 of 1 captions looked at are not there (e.g. of a.png)" in capsys.readouterr().out
