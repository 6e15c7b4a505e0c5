"""From a file, or a frame of another library, to the texts of a table and what they mean.

Four steps, each a module: `files` unpacks and decodes, `table` finds separator, header and rows,
`columns` says which column is what, by the `words` of their names and by their cells, and
`numbers` and `times` decide how a whole column is written before a single cell of it is read
(`formats` has the ways to write a day, `stamps` those to write a time as one number).  `frames`
makes the same table of pandas, polars, Arrow and xarray objects.  What was decided is said in
words that end up in `Prices.note`.
"""
