def write_report(path, **_):
    return None
