"""The data that training reads: packed tokens, their order, and batches.

A document goes this way from a raw file to the GPU:

1. ``prepare/inputs.py`` finds the raw files and names the shard of each.
2. ``prepare/prepare.py`` skips those whose shard is done, and ``prepare/workers.py`` hands the others to worker
   processes.
3. ``prepare/readers.py`` reads the documents of a file as ``TextChunk``s of UTF-8.
4. ``prepare/encode.py`` turns them into ``TokenChunk``s of ids, with the fast encoder or ``tokenizer.py`` itself.
5. ``prepare/prepare.py`` adds bos and eos and appends them to the file's shard by ``data/packed.py``, which also writes
   the manifest; ``data/metadata.py`` checks both when they are read.
6. ``data/packed.py`` reads the shards as one stream of tokens, cut into blocks; ``data/lit_chunks.py`` does so for
   upstream's files.
7. ``data/mixture.py`` computes which block of which source each sample of the run is.
8. ``data/loader.py`` reads a rank's samples ahead in a thread and copies the micro-batches to the GPU.
"""
