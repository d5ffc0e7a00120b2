//! The gate.

use proptest::prelude::*;

use super::super::cookie::ROTATION;
use super::super::hello::{ClientHello, RECORD_HEADER};
use super::*;

fn gate() -> (Gate, Instant) {
    let now = Instant::now();
    (Gate::new(context(), now).unwrap(), now)
}

fn first_hello() -> Bytes {
    let mut device = Device::new();
    device.go_on();
    device.next_datagram().unwrap()
}

/// The beginning of a ClientHello, as a fragment of its own.
fn fragment(hello: &[u8], body: usize) -> Vec<u8> {
    let mut fragment = hello[..RECORD_HEADER + 12 + body].to_vec();
    fragment[11..13].copy_from_slice(&((12 + body) as u16).to_be_bytes());
    fragment[RECORD_HEADER + 9..RECORD_HEADER + 12]
        .copy_from_slice(&(body as u32).to_be_bytes()[1..]);
    fragment
}

#[test]
fn a_cookie_is_good_at_its_address_only() {
    let (mut gate, now) = gate();
    let hello = Device::new().hello(&mut gate, now, address(1));
    for other in [address(2), ([192, 0, 2, 2], 1).into()] {
        let offer = gate.offer(now, other, &hello);
        assert!(matches!(offer, Offer::Answer(_)), "{offer:?}");
    }
    let offer = gate.offer(now, address(1), &hello);
    assert!(matches!(offer, Offer::Accepted(_)), "{offer:?}");
}

#[test]
fn a_cookie_is_good_for_one_rotation() {
    let (mut gate, now) = gate();
    let hello = Device::new().hello(&mut gate, now, address(1));
    let good =
        |gate: &mut Gate, now| matches!(gate.offer(now, address(1), &hello), Offer::Accepted(_));
    assert!(good(&mut gate, now + ROTATION - Duration::from_secs(1)));
    assert!(good(&mut gate, now + ROTATION));
    assert!(!good(&mut gate, now + 2 * ROTATION));
    // And after a silence in which nothing was rotated.
    let hello = Device::new().hello(&mut gate, now + 2 * ROTATION, address(1));
    let offer = gate.offer(now + 4 * ROTATION, address(1), &hello);
    assert!(matches!(offer, Offer::Answer(_)), "{offer:?}");
}

#[test]
fn a_cookie_is_of_one_gate_and_one_hello() {
    let (mut gate, now) = gate();
    let hello = Device::new().hello(&mut gate, now, address(1));
    let mut other = Gate::new(context(), now).unwrap();
    let offer = other.offer(now, address(1), &hello);
    assert!(matches!(offer, Offer::Answer(_)), "{offer:?}");
    let mut changed = hello.to_vec();
    changed[RECORD_HEADER + 12 + 2 + 5] ^= 1;
    let offer = gate.offer(now, address(1), &changed);
    assert!(matches!(offer, Offer::Answer(_)), "{offer:?}");
}

#[test]
fn an_answer_is_not_longer_than_the_question() {
    let (mut gate, now) = gate();
    let hello = first_hello();
    let parsed = ClientHello::parse(&hello).unwrap();
    assert!(parsed.cookie.is_empty() && parsed.session_id.is_empty());
    // The shortest that is answered: it ends with its empty cookie.
    let shortest = fragment(&hello, 2 + 32 + 1 + 1);
    for question in [&hello[..], &shortest] {
        let Offer::Answer(answer) = gate.offer(now, address(1), question) else {
            panic!("no answer");
        };
        assert!(answer.len() <= question.len(), "{}", answer.len());
        assert_eq!(answer.len(), 44);
    }
}

#[test]
fn what_begins_no_handshake_is_ignored() {
    let (mut gate, now) = gate();
    let (mut device, _) = established(&context(), Device::new());
    let data = device.message(b"data of a session that is gone");
    let hello = first_hello();
    let mut later_fragment = hello.to_vec();
    later_fragment[RECORD_HEADER + 8] = 1;
    let mut next_epoch = hello.to_vec();
    next_epoch[4] = 1;
    let mut tls = hello.to_vec();
    tls[1] = 3;
    let server_hello = {
        let mut message = hello.to_vec();
        message[RECORD_HEADER] = 2;
        message
    };
    for datagram in [
        &data[..],
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0; 1500],
        &[0xff; 65_507],
        &later_fragment,
        &next_epoch,
        &tls,
        &server_hello,
    ] {
        let offer = gate.offer(now, address(1), datagram);
        assert!(matches!(offer, Offer::Ignored), "{offer:?}");
    }
    for end in 0..hello.len() {
        let offer = gate.offer(now, address(1), &hello[..end]);
        assert!(matches!(offer, Offer::Ignored), "{end}: {offer:?}");
    }
}

/// A ClientHello with post-quantum keys is longer than a datagram may be.
#[test]
fn a_hello_in_fragments_is_taken() {
    let context = context();
    let now = Instant::now();
    let mut gate = Gate::new(context, now).unwrap();
    let mut device = Device::new();
    let hello = device.hello(&mut gate, now, address(1));
    let body = hello.len() - RECORD_HEADER - 12;
    let first = fragment(&hello, 60);
    // The second: the rest, from byte 60.
    let mut second = hello[..RECORD_HEADER + 12].to_vec();
    second.extend(&hello[RECORD_HEADER + 12 + 60..]);
    second[10] += 1;
    second[11..13].copy_from_slice(&((12 + body - 60) as u16).to_be_bytes());
    second[RECORD_HEADER + 8] = 60;
    second[RECORD_HEADER + 9..RECORD_HEADER + 12]
        .copy_from_slice(&((body - 60) as u32).to_be_bytes()[1..]);

    let offer = gate.offer(now, address(1), &second);
    assert!(matches!(offer, Offer::Ignored), "{offer:?}");
    let Offer::Accepted(mut session) = gate.offer(now, address(1), &first) else {
        panic!("not accepted");
    };
    assert_eq!(session.next_datagram(), None);
    session.receive(&second);
    let flight = session.next_datagram().expect("a ServerHello");
    assert_eq!(flight[RECORD_HEADER], 2, "{session:?}");
}

#[test]
fn the_context_can_be_replaced() {
    let (mut gate, now) = gate();
    let hello = Device::new().hello(&mut gate, now, address(1));
    gate.replace_context(context());
    let offer = gate.offer(now, address(1), &hello);
    assert!(matches!(offer, Offer::Accepted(_)), "{offer:?}");
}

proptest! {
    #[test]
    fn no_datagram_hurts_the_gate(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
    ) {
        thread_local! {
            static SETUP: (Context, Bytes) = (context(), first_hello());
        }
        let (context, hello) = SETUP.with(|(context, hello)| (context.clone(), hello.clone()));
        let now = Instant::now();
        let mut gate = Gate::new(context, now).unwrap();
        let mut changed = hello.to_vec();
        for (at, value) in changes {
            let at = at.index(changed.len());
            changed[at] = value;
        }
        for datagram in [bytes, changed] {
            match gate.offer(now, address(1), &datagram) {
                Offer::Answer(answer) => prop_assert!(answer.len() <= datagram.len()),
                Offer::Accepted(_) => prop_assert!(false, "without a cookie"),
                Offer::Ignored => {}
            }
        }
    }
}
