"""Where labelled images come from; one file per kind of data specification."""
