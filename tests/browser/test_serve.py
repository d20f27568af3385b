"""What the page's server refuses; it needs Voila, but no browser."""

from concurrent.futures import ThreadPoolExecutor


def test_another_name_or_another_site_gets_no_page(ask):
    assert ask({"Host": "evil.com"})[0] == 403
    status, shown = ask({"Sec-Fetch-Site": "cross-site"})
    assert status == 403 and "Another site asked for this page" in shown


def test_a_visitor_has_one_page_and_all_have_three_even_when_they_ask_at_once(ask):
    cookie = {"Cookie": "qlora_ag_news_visitor=one"}
    assert [ask(cookie)[0], ask(cookie)[0]] == [200, 200]
    with ThreadPoolExecutor() as pool:
        answers = sorted(pool.map(ask, [{}] * 3))
    assert [status for status, _ in answers] == [200, 200, 503]
    assert "3 pages are open: close one" in answers[2][1]
