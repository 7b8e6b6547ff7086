from autopeft.compression.record import CompressionRecord, Step
from autopeft.compression.settings import CompressionSettings
from autopeft.core.codec import decode, encode


def test_a_record_survives_json_and_knows_what_it_cost():
    steps = (Step("trained", 1000, 0.5, {"top1": 0.9}), Step("4 bits, lloyd", 200, 0.75, {"top1": 0.8}))
    record = CompressionRecord(
        "..",
        None,
        "p",
        "a",
        "change",
        CompressionSettings(bits=4),
        steps,
        None,
        "s",
        300,
        {"w": 0.1},
        0.45,
        ((0.4, 1.0),),
    )
    data = encode(record)
    assert data["schema"] == "autopeft.compress/1"
    assert decode(CompressionRecord, data) == record
    assert record.increase == 0.25
