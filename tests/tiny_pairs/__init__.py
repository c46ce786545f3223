"""A TFDS data set in a folder of its own, as TFDS asks of builders."""
