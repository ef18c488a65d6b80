"""The checkpoint that is written: planned, filled tensor by tensor, resumed, published."""
