# Asks a Hocket router: ask.rb ROUTER MODEL ROW..., where a row is numbers like 0.5,-1,2.
# ROUTER is host:port, dns:///name:port, or ipv4:HOST:PORT,HOST:PORT. HOCKET_CA_FILE turns TLS on.
require "json"
require "google/protobuf/well_known_types"
require "google/rpc/code_pb"
require "google/rpc/error_details_pb"
require "grpc"
require "grpc/health/v1/health_services_pb"
require "hocket/v1/router_services_pb"

# Routers take turns while they say that they serve; a call that has got nothing yet is tried again.
SERVICE_CONFIG = {
  loadBalancingConfig: [{ round_robin: {} }],
  healthCheckConfig: { serviceName: "hocket.v1.RouterService" },
  methodConfig: [{
    name: [{ service: "hocket.v1.RouterService" }],
    retryPolicy: {
      maxAttempts: 4, initialBackoff: "0.1s", maxBackoff: "1s", backoffMultiplier: 2,
      retryableStatusCodes: ["UNAVAILABLE"]
    }
  }],
  retryThrottling: { maxTokens: 512, tokenRatio: 0.1 }
}.freeze
OPTIONS = {
  "grpc.max_receive_message_length" => 16 * 2**20,
  "grpc.service_config" => SERVICE_CONFIG.to_json
}.freeze

# Rows of numbers as a tensor: float32, little-endian, row-major.
def to_tensor(rows)
  Hocket::V1::Tensor.new(datatype: "FP32", shape: [rows.size, rows[0].size], contents: rows.flatten.pack("e*"))
end

# A tensor as rows of numbers.
def to_rows(tensor)
  tensor.contents.unpack("e*").each_slice(tensor.shape[1]).to_a
end

# Status, stable reason and message of a failed call. Branch on the reason, never on the message.
def describe(error)
  details = error.to_rpc_status&.details || []
  packed = details.find { |detail| detail.is(Google::Rpc::ErrorInfo) }
  reason = packed ? packed.unpack(Google::Rpc::ErrorInfo).reason : "-"
  "#{Google::Rpc::Code.lookup(error.code)} #{reason}: #{error.details}"
end

# Every call needs a deadline.
def within(seconds)
  { deadline: Time.now + seconds }
end

def main(address, model, *texts)
  ca_file = ENV["HOCKET_CA_FILE"]
  credentials = ca_file ? GRPC::Core::ChannelCredentials.new(File.read(ca_file)) : :this_channel_is_insecure
  router = Hocket::V1::RouterService::Stub.new(address, credentials, channel_args: OPTIONS)
  probe = Grpc::Health::V1::Health::Stub.new(address, credentials, channel_args: OPTIONS)

  request = Grpc::Health::V1::HealthCheckRequest.new(service: "hocket.v1.RouterService")
  puts "health: #{probe.check(request, **within(5)).status}"

  page_token = ""
  loop do
    page = router.list_mixtures(Hocket::V1::ListMixturesRequest.new(page_token: page_token), **within(5))
    page.mixtures.each { |mixture| puts "model: #{mixture.name}, experts: #{mixture.expert_count}" }
    page_token = page.next_page_token
    break if page_token.empty?
  end

  input = to_tensor(texts.map { |text| text.split(",").map { |number| Float(number) } })
  request = Hocket::V1::PredictRequest.new(model: model, input: input, partials: true)
  router.predict(request, **within(10)).each do |response|
    case response.event
    when :plan
      puts "labels: #{response.plan.labels.join(', ')}" unless response.plan.labels.empty?
      response.plan.experts.each do |expert|
        puts "plan: #{expert.expert} rows #{expert.rows.to_a.to_json} weights #{expert.weights.to_a.to_json}"
      end
    when :partial
      partial = response.partial
      puts "partial #{partial.sequence}: #{to_rows(partial.value).to_json} coverage #{partial.coverage.to_a.to_json}"
    when :final
      combination = response.final.combination
      puts "final: #{to_rows(combination.value).to_json} coverage #{combination.coverage.to_a.to_json} " \
           "#{response.final.finish.reason}"
    end
  end
end

abort "ask.rb ROUTER MODEL ROW..." if ARGV.size < 3
$stdout.sync = true
begin
  main(*ARGV)
rescue GRPC::BadStatus => e
  abort describe(e)
end
