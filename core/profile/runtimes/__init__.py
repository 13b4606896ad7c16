"""One file per runtime that can be measured."""
