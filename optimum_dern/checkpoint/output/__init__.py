"""The compressed checkpoint: its plan, its shards written tensor by tensor with resume, and its sidecar files."""
