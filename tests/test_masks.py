"""Keys in URIs: found wherever they stand in a text, and nothing else is changed."""

import json
import pickle

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.folders import digest_of, to_json
from engine.masks import masked
from engine.places import Place, masked_column
from engine.schema import InputError, RunError, first_line

SAFE = [
    "/data/a@b?token=x.jpg",
    "images/a@b.jpg",
    "s3://bucket/a@b.jpg",
    "s3://bucket/a:b@c.jpg?region=eu-west-1&endpoint_override=127.0.0.1:9000",
    "https://host:8080/a@b.jpg?id=1&size=2#c@d",
    "hf://owner/name",
    "one of s3://bucket/x, gs://other/y; write to someone@example.org",
]
KEYED = {
    "s3://AKIA:SECRET@bucket/a%20b.jpg?region=x": "s3://***@bucket/a%20b.jpg?region=x",
    "s3://AKIA:SEC/RET+1@bucket/a@b.jpg": "s3://***@bucket/a@b.jpg",
    "s3://AKIA:SECRET@bucket": "s3://***@bucket",
    "http://someone@example.org:SECRET@host:80/x": "http://***@host:80/x",
    "https://SECRET@host/x": "https://***@host/x",
    "s3://bucket/x?access_key=SECRET&secret_key=SECRET&region=x": "s3://bucket/x?access_key=***&secret_key=***&region=x",
    "https://b.s3.amazonaws.com/x?X-Amz-Credential=SECRET%2F1&X-Amz-Date=1&X-Amz-Signature=SECRET": (
        "https://b.s3.amazonaws.com/x?X-Amz-Credential=***&X-Amz-Date=1&X-Amz-Signature=***"
    ),
    "https://a.blob.core.windows.net/c/x?sv=2024&sig=SECRET%3D": "https://a.blob.core.windows.net/c/x?sv=2024&sig=***",
    "pool 's3://k:SECRET@b/x' and 'gs://SECRET@c/y?Token=SECRET', twice": (
        "pool 's3://***@b/x' and 'gs://***@c/y?Token=***', twice"
    ),
}


@pytest.mark.parametrize("text", SAFE)
def test_texts_without_keys_stay_as_they_are(text):
    assert masked(text) == text
    column = pa.chunked_array([[text, None]])
    assert masked_column(column) is column


@pytest.mark.parametrize("text", KEYED)
def test_keys_are_masked(text):
    assert masked(text) == KEYED[text]
    assert masked(masked(text)) == KEYED[text]
    assert masked_column(pa.chunked_array([[text, None, SAFE[0]]])).to_pylist() == [KEYED[text], None, SAFE[0]]


@given(st.text(st.sampled_from("as3:/@?&=k token sig'"), max_size=30))
def test_what_arrow_lets_pass_has_no_keys(text):
    assert masked_column(pa.array([text])).to_pylist() == [masked(text)]


@pytest.mark.parametrize("text", KEYED)
def test_neither_errors_nor_json_nor_digests_have_them(text):
    assert str(InputError(f"pool {text} is bad")) == f"pool {KEYED[text]} is bad"
    assert str(pickle.loads(pickle.dumps(RunError(text)))) == KEYED[text]
    assert first_line(OSError(text)) == KEYED[text]
    assert json.loads(to_json({"uris": [text, "a@b"]})) == {"uris": [KEYED[text], "a@b"]}
    assert digest_of({"uri": text}) == digest_of({"uri": KEYED[text]})


def test_a_place_opens_with_its_keys_and_shows_none():
    place = Place("s3://k:SECRET@bucket/a%20b?region=us-east-1").at("c d", "e")
    assert (place.address, place.path) == ("s3://k:SECRET@bucket/a%20b/c%20d/e?region=us-east-1", "bucket/a b/c d/e")
    assert (place.uri, str(place)) == ("s3://***@bucket/a%20b/c%20d/e?region=us-east-1", f"Place({place.uri!r})")
    assert place.folder.address == "s3://k:SECRET@bucket/a%20b/c%20d?region=us-east-1"
    assert place.absolute == place.address
