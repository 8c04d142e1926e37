"""Spark: the same expressions on a cluster, or on this machine with `local[*]`."""

import contextlib
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from pyarrow import types

from ldm_lab.config import Plain, register
from ldm_lab.curation.metadata.engine import Engine, ResultRow
from ldm_lab.curation.metadata.inputs import DISK_FULL, Files
from ldm_lab.curation.metadata.layouts import unique_names
from ldm_lab.curation.sql import identifier
from ldm_lab.errors import UserError, first_line, install

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LOG = """\
rootLogger.level = error
rootLogger.appenderRef.console.ref = console
logger.context.name = org.apache.spark.SparkContext
logger.context.level = off
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n
"""

FIXED = {"spark.sql.caseSensitive": "true", "spark.sql.session.timeZone": "UTC"}  # WIDTH and width are two columns
JAVA = 17  # the oldest that Spark runs on
CONNECT_SECONDS = 10  # that a master's machine may take to answer


@register("engine", "spark")
class Spark(Engine):
    """Apache Spark, version 4; needs Java 17 and the extra `spark`.

    Args:
        master: such as local[*], spark://host:7077, yarn.
        config: further settings, such as {spark.executor.memory: 8g, spark.local.dir: /scratch}; as overrides
            engine.config.spark.executor.memory=8g.
    """

    def __init__(self, *, master: str = "local[*]", config: dict[str, Any] | None = None):
        self.master, self.config = master, dotted(config or {})

    @staticmethod
    def check(*, config: dict[str, Any] | None) -> list[str]:
        """Return what is wrong with `config`."""
        problems = []
        for name, value in dotted(config or {}).items():
            if not name.startswith("spark."):
                problems.append(f"config.{name}: the settings of Spark begin with spark.")
            elif value != FIXED.get(name, value):
                problems.append(f"config.{name}: is {FIXED[name]} here, so that Spark reads tables as DuckDB does")
        return problems

    @contextlib.contextmanager
    def open(self, spill: str | Path) -> Iterator["Spark"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from pyspark.errors import PySparkException
                from pyspark.sql import SparkSession
        except ImportError:
            raise UserError(f"engine: Spark is not installed: {install('spark')}") from None
        from py4j.protocol import Py4JError

        check_reachable(self.master)
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        logging.getLogger("py4j").setLevel(logging.ERROR)
        builder = SparkSession.builder.master(self.master).appName("ldm_lab select")
        settings = {
            "spark.log.level": "ERROR",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.local.dir": str(spill),
            **self.config,
            **FIXED,
        }
        log = Path(spill) / "log4j2.properties"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(LOG)
        settings.setdefault("spark.driver.extraJavaOptions", f"-Dlog4j2.configurationFile={log.absolute().as_uri()}")
        for name, value in settings.items():
            builder = builder.config(name, value)
        try:
            self.session = builder.getOrCreate()
        except (PySparkException, Py4JError, RuntimeError, OSError) as error:
            raise UserError(f"engine: {_why_not_started(self.master, _message(error))}") from None
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"ibis|pyspark")
                self.ibis = ibis.pyspark.connect(self.session)
                yield self
        except (PySparkException, Py4JError) as error:
            cause = None if any(text in str(error) for text in DISK_FULL) else error
            raise UserError(f"engine: {_message(error)}") from cause
        finally:
            self.session.stop()

    def read(self, files: Files) -> ir.Table:
        """Return the table in Parquet files; see `Engine.read`. Raises UserError for a type that Spark cannot read."""
        for layout in files.layouts:
            for name, kind in layout.columns.values():
                if _is_foreign(kind):
                    raise UserError(
                        f"engine: Spark cannot read the column {name!r}, which is {kind}, in {layout.paths[0]}; "
                        "engine.name=duckdb can"
                    )
        return super().read(files)

    def read_parquet(self, paths: Sequence[str], names: Sequence[str]) -> ir.Table:
        elsewhere = any("://" in path for path in paths)
        frame = self.session.read.option("mergeSchema", elsewhere).parquet(*map(_address, paths))
        if names:
            # By name, as Spark's order of columns is that of whichever file it looked at.
            frame = frame.selectExpr(*(identifier(name, "`") for name in names)).toDF(*unique_names(names))
        return self._table(frame)

    def _table(self, frame: "DataFrame") -> ir.Table:
        """Return a frame as ibis knows it."""
        name = f"input_{len(self.session.catalog.listTables())}"
        frame.createOrReplaceTempView(name)
        return self.ibis.table(name)

    def rows(self, expression: ir.Table) -> list[ResultRow]:
        return [row.asDict() for row in self.session.sql(self.ibis.compile(expression)).collect()]

    def write(
        self, expression: ir.Table, folder: Path, *, parts: int | None, key: str | None, metadata: dict[str, str]
    ) -> int:
        """Write a table; see `Engine.write`. `metadata` is not written: Spark has no way to."""
        frame = self.session.sql(self.ibis.compile(expression))
        if key is not None:
            frame = (
                (frame.repartitionByRange(parts, key) if parts else frame.repartitionByRange(key))
                .sortWithinPartitions(key)
                .drop(key)
            )
        elif parts:
            frame = frame.repartition(parts)
        target = folder / "spark"
        frame.write.parquet(_address(str(target)), compression="snappy")
        for number, path in enumerate(sorted(target.glob("part-*.parquet"))):
            path.rename(folder / f"part-{number:05d}.parquet")
        for path in target.iterdir():
            path.unlink()
        target.rmdir()
        import pyarrow.parquet as pq

        return sum(pq.read_metadata(path).num_rows for path in folder.glob("part-*.parquet"))


def _is_foreign(kind: pa.DataType) -> bool:
    """Return whether Spark has no type for a column's, or for what is in it."""
    if (
        types.is_float16(kind)
        or types.is_time(kind)
        or types.is_decimal256(kind)
        or (types.is_timestamp(kind) and kind.unit == "ns")
    ):
        return True
    return any(_is_foreign(kind.field(number).type) for number in range(kind.num_fields))


def _address(path: str) -> str:
    return path if "://" in path else f"file://{Path(path).absolute()}"  # Hadoop decodes no %20


def _message(error: Exception) -> str:
    """Return the line of a Java stack that says what happened."""
    if "compress.BrotliCodec" in str(error):
        return "Spark has no Brotli, which compresses one of these files; engine.name=duckdb has it"
    causes = re.findall(r"Caused by: (.+)", str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if len(lines) > 1 and lines[1].startswith(": "):  # the first says only what Python called
        lines = [lines[1].removeprefix(": ")]
    return (causes[-1] if causes else lines[0])[:300]


def dotted(settings: Mapping[str, Plain], prefix: str = "") -> dict[str, str]:
    """Return settings under their whole names, as Spark writes values: overrides nest them at each dot."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{prefix}{name}.")
        elif value is not None:
            flat[f"{prefix}{name}"] = str(value).lower() if isinstance(value, bool) else str(value)
    return flat


def check_reachable(master: str) -> None:
    """Raise UserError if none of the machines of spark://host:port,host:port answers, or if yarn's are not known: Spark
    itself tries for a minute or for ever, and says nothing of it."""
    if master == "yarn" and not (os.environ.get("HADOOP_CONF_DIR") or os.environ.get("YARN_CONF_DIR")):
        raise UserError("engine.master: for yarn HADOOP_CONF_DIR or YARN_CONF_DIR has to say where the cluster is")
    if not master.startswith("spark://"):
        return
    reasons = []
    for address in master.removeprefix("spark://").split(","):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise UserError(f"engine.master: {master}: spark://host:port is needed, such as spark://host:7077")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
            return
        except OSError as error:
            reasons.append(f"{address}: {error.strerror or first_line(error)}")
    raise UserError(f"engine.master: {master} cannot be reached ({'; '.join(reasons)})")


def _why_not_started(master: str, message: str) -> str:
    """Return what keeps Spark from starting: no Java, an old one, or what Spark says."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else "java"
    found = shutil.which(java)
    if found is None:
        return f"Spark needs Java 17 or newer, and there is no {java}"
    said = subprocess.run([found, "-version"], capture_output=True, text=True, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version and int(version[1]) < JAVA:
        return f"Spark needs Java {JAVA} or newer; {found} is of version {version[1]}"
    return f"Spark does not start with engine.master {master} ({message})"
