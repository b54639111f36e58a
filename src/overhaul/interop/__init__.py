"""The only places that know the names of other libraries."""
