//! Waiting for the first of two futures, always asking the left one first:
//! the only select core uses, so that replay sees the same order.

use super::{Clock, Time};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

/// Which of two futures finished first.
#[derive(Debug, PartialEq, Eq)]
pub enum Either<A, B> {
    /// The left one.
    Left(A),
    /// The right one.
    Right(B),
}

/// Runs both until one is done; the other is dropped. Left wins ties.
pub async fn race<A: Future, B: Future>(left: A, right: B) -> Either<A::Output, B::Output> {
    let mut left = pin!(left);
    let mut right = pin!(right);
    poll_fn(move |cx| {
        if let Poll::Ready(out) = left.as_mut().poll(cx) {
            return Poll::Ready(Either::Left(out));
        }
        if let Poll::Ready(out) = right.as_mut().poll(cx) {
            return Poll::Ready(Either::Right(out));
        }
        Poll::Pending
    })
    .await
}

/// Lets the actor's other tasks run once. For loops that wait for something that a
/// peer can keep ready for ever: without it one flood is served and nobody else.
pub async fn pause() {
    let mut paused = false;
    poll_fn(move |cx| {
        if std::mem::replace(&mut paused, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Runs `future` until `deadline`; `None` if the deadline came first.
pub async fn timeout<F: Future>(clock: &dyn Clock, deadline: Time, future: F) -> Option<F::Output> {
    match race(future, clock.sleep_until(deadline)).await {
        Either::Left(out) => Some(out),
        Either::Right(()) => None,
    }
}
