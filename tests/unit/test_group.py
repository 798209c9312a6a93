"""Who gets which rank."""

from workers.group import Place, posts_of

ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2"}


def test_ranks_go_machine_by_machine_and_gpu_by_gpu() -> None:
    places = [Place("b", 5, "10"), Place("a", 6, "0"), Place("b", 7, "9"), Place("a", 8, "1"), Place("b", 9, "2")]
    posts = posts_of(places, ADDRESSES)
    assert list(posts) == [4, 2, 0, 1, 3]
    assert [post.rank for post in posts.values()] == [0, 1, 2, 3, 4]
    assert [(post.machine, post.local_rank) for post in posts.values()] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert {post.gpus for post in posts.values() if post.machine == 0} == {("2", "9", "10")}
    assert {(post.address, post.port, post.num_workers) for post in posts.values()} == {("10.0.0.2", 9, 5)}  # rank 0's


def test_workers_on_cpus_keep_their_order() -> None:
    posts = posts_of([Place("a", port, None) for port in (1, 2, 3)], ADDRESSES)
    assert [(index, post.rank, post.local_rank, post.gpus) for index, post in posts.items()] == [
        (0, 0, 0, ()),
        (1, 1, 1, ()),
        (2, 2, 2, ()),
    ]
