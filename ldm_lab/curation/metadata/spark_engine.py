"""Spark: the same expressions on a cluster, or on this machine with `local[*]`."""

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from ldm_lab.config import register
from ldm_lab.curation.metadata.engine import Engine, ResultRow
from ldm_lab.curation.metadata.inputs import DISK_FULL, Files
from ldm_lab.curation.sql import identifier
from ldm_lab.errors import UserError

LOG = """\
rootLogger.level = error
rootLogger.appenderRef.console.ref = console
appender.console.type = Console
appender.console.name = console
appender.console.target = SYSTEM_ERR
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = %d{HH:mm:ss} %p %c{1}: %m%n
"""


@register("engine", "spark")
class Spark(Engine):
    """Apache Spark, version 4; needs Java 17 and `pip install -e '.[spark]'`.

    Args:
        master: such as local[*], spark://host:7077, yarn.
        config: further settings, such as {spark.executor.memory: 8g, spark.local.dir: /scratch}.
    """

    def __init__(self, *, master: str = "local[*]", config: dict[str, Any] | None = None):
        self.master, self.config = master, config or {}

    @contextlib.contextmanager
    def open(self, spill: str | Path) -> Iterator["Spark"]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from pyspark.errors import PySparkException
                from pyspark.sql import SparkSession
        except ImportError:
            raise UserError("engine: Spark is not installed: pip install -e '.[spark]'") from None
        from py4j.protocol import Py4JError

        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        logging.getLogger("py4j").setLevel(logging.ERROR)
        builder = SparkSession.builder.master(self.master).appName("ldm_lab select")
        settings = {
            "spark.log.level": "ERROR",
            "spark.ui.enabled": "false",
            "spark.ui.showConsoleProgress": "false",
            "spark.local.dir": str(spill),
            **self.config,
            "spark.sql.caseSensitive": "true",  # WIDTH and width are two columns
            "spark.sql.session.timeZone": "UTC",
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
            raise UserError(f"engine: Spark does not start; it needs Java 17 or newer ({_message(error)})") from None
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
        reader = self.session.read
        if files.delimiter:
            quote = "" if files.delimiter == "\t" else '"'  # a TSV has no quotes: a " is a character of the caption
            options = {"sep": files.delimiter, "quote": quote, "header": files.header, "mode": "FAILFAST"}
            schema = ", ".join(f"{identifier(name, '`')} string" for name in files.unique_names)
            if not quote:
                options["escape"] = ""
            frame = reader.options(**options).schema(schema).csv(list(map(_address, files.paths)))
        else:
            frame = reader.parquet(*map(_address, files.paths))
            if files.names:
                # By name, as Spark's order of columns is that of whichever file it looked at.
                chosen = [identifier(name, "`") for name in files.names]
                frame = frame.selectExpr(*chosen).toDF(*files.unique_names)
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


def _address(path: str) -> str:
    return path if "://" in path else f"file://{Path(path).absolute()}"  # Hadoop decodes no %20


def _message(error: Exception) -> str:
    """Return the line of a Java stack that says what happened."""
    causes = re.findall(r"Caused by: (.+)", str(error))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return (causes[-1] if causes else lines[0])[:300]
