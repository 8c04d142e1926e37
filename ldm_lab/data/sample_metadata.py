"""What is known of a sample beside its image: its json, and the scores that lie beside its shard."""

from ldm_lab.data.captions import Captions
from ldm_lab.data.samples import DEFAULT_CAPTIONS, RawSample, caption_of
from ldm_lab.data.shard_urls import without_ending
from ldm_lab.io.json_files import Json, parse_json

Metadata = dict[str, Json]  # name, as its json or a table's column is called -> value


def metadata_of(sample: RawSample, captions: Captions = DEFAULT_CAPTIONS) -> Metadata:
    """Return what a sample's json says, if it can be read, with the caption that training takes; of several all."""
    return {**parse_json(sample.json), "caption": caption_of(sample, captions).whole}


def scores_path(address: str, ending: str) -> str:
    """Return the path of the scores beside a shard."""
    return without_ending(address) + ending


def read_scores(path: str) -> dict[str, Metadata]:
    """Return key -> scores of a Parquet file. Raises OSError if it is not readable."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
        return {str(row.pop("key")): row for row in rows}
    except (pa.ArrowException, KeyError) as error:
        raise OSError(str(error)) from None
