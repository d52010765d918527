"""Whose the log is: a program that has set up logging keeps it, and a command writes its own lines."""

import logging

import pytest

from beit.training.console import configure_console


def library_alone(monkeypatch):
    """Returns the library's logger in a program that has set up nothing; call it in the test, as pytest logs too."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logger = logging.getLogger("beit")
    logger.handlers, logger.level = [], logging.NOTSET
    return logger


def test_without_any_handler_the_first_process_writes_its_lines(monkeypatch, capsys):
    library = library_alone(monkeypatch)
    for main_process in (True, False):
        configure_console(main_process)
        logging.getLogger("beit.tasks").info("a line of %s", main_process)
    assert capsys.readouterr().err.split()[1:] == ["a", "line", "of", "True"]
    assert len(library.handlers) == 1


@pytest.mark.parametrize("name", ["", "beit"])
def test_a_programs_handlers_and_level_stay(name, monkeypatch, capsys):
    # Broken by a job that takes the handler away, adds one of its own beside it, or sets another level.
    library = library_alone(monkeypatch)
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger(name).addHandler(handler)
    configure_console(main_process=True)
    library.info("to the program")
    assert lines == ["to the program"]
    library.setLevel(logging.ERROR)
    configure_console(main_process=True)
    library.info("not wanted")
    assert lines == ["to the program"]
    assert capsys.readouterr().err == ""
    configure_console(main_process=True, always=True)  # a command on its own
    library.info("to both")
    assert lines[1:] == ["to both"]
    assert "to both" in capsys.readouterr().err


def test_control_characters_do_not_reach_the_terminal(monkeypatch, capsys):
    # Broken by a photograph whose name clears the screen.
    library = library_alone(monkeypatch)
    configure_console(main_process=True)
    library.info("cannot read %s\nsecond line", "\x1b]0;x\x07\x1b[2J\r\udcff.jpg")
    written = capsys.readouterr().err
    assert "cannot read \\x1b]0;x\\x07\\x1b[2J\\r\\udcff.jpg\nsecond line\n" in written
