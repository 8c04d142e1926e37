"""What public tables call the quantities that rules speak of: LAION's, COYO-700M, DataComp, img2dataset's, CC12M."""

OF_COYO = (
    *("clip_similarity_vitb32", "clip_similarity_vitl14", "nsfw_score_opennsfw2", "nsfw_score_gantman"),
    *("watermark_score", "aesthetic_score_laion_v2"),
)
OF_DATACOMP = ("clip_b32_similarity_score", "clip_l14_similarity_score")
V1 = ("aesthetic",)  # columns with scores of LAION's linear heads
V2 = ("aesthetic_score", "aesthetic_score_laion_v2")  # and with those of the improved predictor
UNSAID = ("prediction",)  # what LAION's scoring writes, whatever it scored

# quantity -> names of columns, in lower case, in groups: of the first group that is there, one column is the quantity,
# and several are a doubt.
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "url": (("url",),),
    "caption": (("caption",), ("text",)),
    "width": (("original_width",), ("width",)),  # img2dataset's `width` is that of the resized image
    "height": (("original_height",), ("height",)),
    "similarity": (("similarity", *OF_COYO[:2], *OF_DATACOMP),),
    "hash": (("hash",),),
    "punsafe": (("punsafe", *OF_COYO[2:4]),),
    "pwatermark": (("pwatermark", "watermark_score"),),
    "aesthetic": ((*V1, *V2, *UNSAID),),
    "aesthetic_v1": (V1, (*UNSAID, *V2)),
    "aesthetic_v2": (V2, (*V1, *UNSAID)),
    "prediction": (UNSAID,),
    "nsfw": (("nsfw",),),
    "language": (("language",),),
    "status": (("status",),),
    "sha256": (("sha256",),),
    "md5": (("md5",),),
}
# quantity -> the one that users name
PLAIN = {"aesthetic_v1": "aesthetic", "aesthetic_v2": "aesthetic"}
STANDARD = {"url": "URL", "caption": "TEXT", "width": "WIDTH", "height": "HEIGHT"}  # quantity -> column of a selection

SIZES = "all releases of LAION (WIDTH, HEIGHT), COYO-700M, DataComp and img2dataset's output (original_width, ...)"
# quantity -> who has it, for messages
RELEASES = {
    "width": SIZES,
    "height": SIZES,
    "similarity": "all releases of LAION, COYO-700M, DataComp",
    "hash": "the -joined, -aesthetic and -aesthetic-tags tables, laion-art, laion-high-resolution, improved_aesthetics",
    "punsafe": "the -joined and -aesthetic tables, laion-art, laion-high-resolution, improved_aesthetics, COYO-700M "
    "(nsfw_score_opennsfw2, nsfw_score_gantman); the base collections have NSFW instead",
    "pwatermark": "the -joined and -aesthetic tables, laion-art, laion-high-resolution, improved_aesthetics, COYO-700M "
    "(watermark_score)",
    "aesthetic": "the -aesthetic tables and laion-art (aesthetic), improved_aesthetics (AESTHETIC_SCORE), COYO-700M "
    "(aesthetic_score_laion_v2), the -aesthetic-tags (aesthetic or prediction, to be joined with `tags:`), what "
    "`python -m ldm_lab score` writes",
    "nsfw": "the base collections: laion400m, laion2B-en, laion2B-multi, laion1B-nolang; the -joined tables have "
    "punsafe instead",
    "language": "laion2B-multi and its -joined and -aesthetic tables, laion-art, laion-high-resolution; `language: en` "
    "says it for a table of one language",
    "status": "img2dataset's output",
    "sha256": "DataComp, and img2dataset's output by its default compute_hash",
    "md5": "img2dataset's output, with compute_hash md5",
}


def plain(quantity: str) -> str:
    """Return the name that users have for a quantity, whichever predictor's it is."""
    return PLAIN.get(quantity, quantity)
