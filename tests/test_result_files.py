import json

import result_files


def test_result_file_says_where_it_comes_from(tmp_path):
    result_files.write_result(tmp_path / "a" / "r.json", "evaluation", [{"miou": 1.5}], 2.0, "torch")
    result = json.loads((tmp_path / "a" / "r.json").read_text())
    assert {"what", "command", "created", "code", "machine", "torch", "mgd_ops", "seconds", "rows"} == result.keys()
    assert result["machine"].keys() == {"cpu", "gpu", "threads"} and result["rows"] == [{"miou": 1.5}]
