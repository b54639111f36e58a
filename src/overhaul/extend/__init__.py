"""Methods that go on pre-training: new text, new languages, without losing the old."""
