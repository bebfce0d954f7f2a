"""From raw text shards to the batches of one rank."""
