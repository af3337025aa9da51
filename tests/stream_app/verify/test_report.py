from stream_app.verify.report import Report

HINT = "STREAM_APP_TOP_K"


def test_wrong_lists_of_right_states_make_one_think_of_the_settings():
    report = Report(verified_users=1)
    report.fault("wrong_recommendations", "of user 'u'")
    assert HINT in report.as_text()
    report.fault("wrong_states", "of user 'u'")
    assert HINT not in report.as_text()


def test_a_clean_report_says_nothing_of_settings():
    assert HINT not in Report(verified_users=1).as_text()
