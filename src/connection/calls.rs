//! The callbacks of one connection that are in flight.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;

use crate::broker::Delivery;
use crate::handler::CallFailure;

/// How a callback ended, and the messages it carried.
pub(super) type Ended = (Result<(), CallFailure>, Vec<Delivery>);

/// Most often it holds one, and nothing on the heap when it holds none.
#[derive(Default)]
pub(super) struct Calls {
    /// Callbacks with messages, and all others: each kind ends in its order.
    messages: VecDeque<InFlight>,
    others: VecDeque<InFlight>,
    size: usize,
}

struct InFlight {
    future: BoxFuture<'static, Result<(), CallFailure>>,
    deliveries: Vec<Delivery>,
    size: usize,
}

impl Calls {
    /// Bytes that they carry.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// One more.
    pub(super) fn begin(
        &mut self,
        of_messages: bool,
        size: usize,
        deliveries: Vec<Delivery>,
        future: BoxFuture<'static, Result<(), CallFailure>>,
    ) {
        let calls = match of_messages {
            true => &mut self.messages,
            false => &mut self.others,
        };
        calls.push_back(InFlight {
            future,
            deliveries,
            size,
        });
        self.size += size;
    }

    /// The next that has ended.
    pub(super) fn poll_ended(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        for calls in [&mut self.others, &mut self.messages] {
            let Some(first) = calls.front_mut() else {
                continue;
            };
            if let Poll::Ready(result) = first.future.as_mut().poll(cx) {
                let deliveries = std::mem::take(&mut first.deliveries);
                self.size = self.size.saturating_sub(first.size);
                calls.pop_front();
                if calls.is_empty() {
                    *calls = VecDeque::new();
                }
                return Poll::Ready((result, deliveries));
            }
        }
        Poll::Pending
    }

    /// Waits until none is left.
    pub(super) async fn all_ended(&mut self) {
        while !(self.others.is_empty() && self.messages.is_empty()) {
            poll_fn(|cx| self.poll_ended(cx)).await.0.ok();
        }
    }
}
