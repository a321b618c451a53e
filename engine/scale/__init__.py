"""Tasks on batches of any engine of data: Ray Data, Spark, Daft, or a loop."""
