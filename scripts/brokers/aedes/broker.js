// An aedes that lets everybody in, for scripts/brokers.sh. Argument: port.
import { createServer } from 'node:net'
import { Aedes } from 'aedes'

const broker = await Aedes.createBroker()
broker.on('clientError', (client, error) => console.error(client.id, error.message))
broker.on('connectionError', (client, error) => console.error(client.id, error.message))
createServer(broker.handle).listen(Number(process.argv[2]), '127.0.0.1')
