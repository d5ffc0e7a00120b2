//! Bad links: handshakes whose datagrams are lost, doubled or overtaken.

use std::thread;

use super::*;

/// What happens to one datagram.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Lost,
    Doubled,
    /// Comes after the next one, or after a while.
    Late,
}

/// A link in one direction that has one fault.
struct Link {
    fault: Option<(usize, Fault)>,
    count: usize,
    late: Option<Bytes>,
}

impl Link {
    fn carry(&mut self, datagram: Option<Bytes>) -> Vec<Bytes> {
        let Some(datagram) = datagram else {
            return self.late.take().into_iter().collect();
        };
        self.count += 1;
        let fault = self.fault.filter(|(at, _)| *at == self.count);
        let mut arriving = match fault {
            Some((_, Fault::Lost)) => Vec::new(),
            Some((_, Fault::Doubled)) => vec![datagram.clone(), datagram],
            Some((_, Fault::Late)) => {
                self.late = Some(datagram);
                return Vec::new();
            }
            None => vec![datagram],
        };
        arriving.extend(self.late.take());
        arriving
    }
}

/// A handshake and a message over such links. Says how many datagrams went each way.
fn run(context: &Context, up: Option<(usize, Fault)>, down: Option<(usize, Fault)>) -> [usize; 2] {
    let link = |fault| Link {
        fault,
        count: 0,
        late: None,
    };
    let (mut up, mut down) = (link(up), link(down));
    let mut gate = Gate::new(context.clone(), Instant::now()).unwrap();
    let mut device = Device::new();
    let mut session: Option<Box<Session>> = None;
    let start = Instant::now();
    let mut answer = None;
    loop {
        assert!(start.elapsed() < Duration::from_secs(30), "{session:?}");
        let done = device.go_on();
        let mut quiet = true;
        loop {
            let datagram = device.next_datagram();
            let last = datagram.is_none();
            for datagram in up.carry(datagram) {
                quiet = false;
                match &mut session {
                    Some(session) => session.receive(&datagram),
                    None => match gate.offer(Instant::now(), address(1), &datagram) {
                        Offer::Accepted(accepted) => session = Some(accepted),
                        Offer::Answer(bytes) => answer = Some(bytes),
                        Offer::Ignored => {}
                    },
                }
                // Answers of the gate go the same way as those of the session.
                if let Some(bytes) = answer.take() {
                    for datagram in down.carry(Some(bytes)) {
                        device.receive(&datagram);
                    }
                }
            }
            if last {
                break;
            }
        }
        if let Some(session) = &mut session {
            // Reading is what answers a Finished that was sent again.
            assert_eq!(session.read(&mut [0; 9]), Read::Pending);
            if session.deadline().is_some_and(|left| left.is_zero()) {
                session.elapsed();
            }
        }
        loop {
            let datagram = session.as_mut().and_then(|session| session.next_datagram());
            let last = datagram.is_none();
            for datagram in down.carry(datagram) {
                quiet = false;
                device.receive(&datagram);
            }
            if last {
                break;
            }
        }
        if let Some(session) = &mut session
            && done
            && session.is_established()
        {
            assert_alive(&mut device, session);
            return [up.count, down.count];
        }
        if quiet {
            thread::sleep(Duration::from_millis(10));
            ffi::handle_timeout(&mut device.stream);
        }
    }
}

#[test]
fn a_handshake_survives_any_one_fault_of_the_link() {
    let dir = tempfile::tempdir().unwrap();
    let small = Options {
        // Flights of several datagrams.
        mtu: 300,
        ..options(dir.path())
    };
    let context = Context::new(&small).unwrap();
    let [up, down] = run(&context, None, None);
    assert!(up >= 3 && down >= 4, "{up} up, {down} down");
    // They wait for timers of a second: all at once.
    let mut runs = Vec::new();
    for fault in [Fault::Lost, Fault::Doubled, Fault::Late] {
        for (at, is_up) in (1..=up)
            .zip([true].repeat(up))
            .chain((1..=down).zip([false].repeat(down)))
        {
            let context = context.clone();
            runs.push(thread::spawn(move || {
                let fault = Some((at, fault));
                if is_up {
                    run(&context, fault, None);
                } else {
                    run(&context, None, fault);
                }
            }));
        }
    }
    for run in runs {
        run.join().unwrap();
    }
}

#[test]
fn a_handshake_without_answer_is_sent_again_and_given_up() {
    let now = Instant::now();
    let mut gate = Gate::new(context(), now).unwrap();
    let hello = Device::new().hello(&mut gate, now, address(1));
    let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
        panic!("not accepted");
    };
    let flight = std::iter::from_fn(|| session.next_datagram()).count();
    let left = session.deadline().unwrap();
    assert!(left <= Duration::from_secs(1), "{left:?}");
    session.elapsed();
    assert_eq!(session.next_datagram(), None, "too early");
    thread::sleep(left);
    session.elapsed();
    // Message by message, where the first time they were packed.
    let again = std::iter::from_fn(|| session.next_datagram()).count();
    assert!(again >= flight, "{again} of {flight}");
    let next = session.deadline().unwrap();
    assert!(next > Duration::from_millis(1500), "{next:?}");
}

#[test]
fn no_datagram_of_a_handshake_is_above_the_mtu() {
    let dir = tempfile::tempdir().unwrap();
    for mtu in [256, 300, 576, 1200, 4096] {
        let options = Options {
            mtu,
            ..options(dir.path())
        };
        let context = Context::new(&options).unwrap();
        let now = Instant::now();
        let mut gate = Gate::new(context, now).unwrap();
        let mut device = Device::new();
        let hello = device.hello(&mut gate, now, address(1));
        let Offer::Accepted(mut session) = gate.offer(now, address(1), &hello) else {
            panic!("not accepted");
        };
        let mut sizes = Vec::new();
        while let Some(datagram) = session.next_datagram() {
            sizes.push(datagram.len());
            device.receive(&datagram);
        }
        assert!(
            sizes.iter().all(|size| *size <= usize::from(mtu)),
            "{mtu}: {sizes:?}"
        );
        assert!(!device.go_on());
        while let Some(datagram) = device.next_datagram() {
            session.receive(&datagram);
        }
        assert!(session.is_established(), "{mtu}: {session:?}");
    }
}
