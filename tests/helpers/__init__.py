"""What several tests share: tiny models, parity with PEFT, texts, layers of other kinds."""
