// Asks a Hocket router: ask ROUTER MODEL ROW..., where a row is numbers like 0.5,-1,2.
// ROUTER is host:port, dns:///name:port, or ipv4:HOST:PORT,HOST:PORT. HOCKET_CA_FILE turns TLS on.
#include <grpcpp/grpcpp.h>

#include <bit>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "hocket/v1/router.grpc.pb.h"
#include "hocket/vendored/health.grpc.pb.h"

using Rows = std::vector<std::vector<float>>;

// Routers take turns while they say that they serve; a call that has got nothing yet is tried again.
constexpr char kServiceConfig[] = R"({
  "loadBalancingConfig": [{"round_robin": {}}],
  "healthCheckConfig": {"serviceName": "hocket.v1.RouterService"},
  "methodConfig": [{
    "name": [{"service": "hocket.v1.RouterService"}],
    "retryPolicy": {
      "maxAttempts": 4, "initialBackoff": "0.1s", "maxBackoff": "1s", "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }],
  "retryThrottling": {"maxTokens": 512, "tokenRatio": 0.1}
})";

// Rows of numbers as a tensor: float32, little-endian (as this machine has them), row-major.
static_assert(std::endian::native == std::endian::little && sizeof(float) == 4);

hocket::v1::Tensor ToTensor(const Rows& rows) {
  hocket::v1::Tensor tensor;
  tensor.set_datatype("FP32");
  tensor.add_shape(rows.size());
  tensor.add_shape(rows.front().size());
  for (const auto& row : rows) {
    tensor.mutable_contents()->append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(float));
  }
  return tensor;
}

// A tensor as rows of numbers.
Rows ToRows(const hocket::v1::Tensor& tensor) {
  Rows rows(tensor.shape(0), std::vector<float>(tensor.shape(1)));
  if (tensor.contents().size() != rows.size() * tensor.shape(1) * sizeof(float)) throw std::length_error("bad tensor");
  const char* bytes = tensor.contents().data();
  for (auto& row : rows) {
    std::memcpy(row.data(), bytes, row.size() * sizeof(float));
    bytes += row.size() * sizeof(float);
  }
  return rows;
}

// A number as the shortest decimal that reads back the same; a list in brackets.
template <typename T>
std::string Show(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    char text[32];
    return {text, std::to_chars(text, std::end(text), value).ptr};
  } else {
    std::string text;
    for (const auto& item : value) text += (text.empty() ? "" : ",") + Show(item);
    return "[" + text + "]";
  }
}

// Status, stable reason and message of a failed call. Branch on the reason, never on the message.
std::string Describe(const grpc::Status& status) {
  google::rpc::ErrorInfo info;
  google::rpc::Status details;
  details.ParseFromString(status.error_details());  // the trailing metadata grpc-status-details-bin
  for (const auto& detail : details.details()) {
    if (detail.Is<google::rpc::ErrorInfo>()) detail.UnpackTo(&info);
  }
  return google::rpc::Code_Name(static_cast<google::rpc::Code>(status.error_code())) + " " +
         (info.reason().empty() ? "-" : info.reason()) + ": " + status.error_message();
}

// Every call needs a deadline.
void SetTimeout(grpc::ClientContext& context, std::chrono::seconds timeout) {
  context.set_deadline(std::chrono::system_clock::now() + timeout);
}

std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
  auto credentials = grpc::InsecureChannelCredentials();
  if (const char* path = std::getenv("HOCKET_CA_FILE")) {
    std::ifstream file(path);
    grpc::SslCredentialsOptions options;
    options.pem_root_certs.assign(std::istreambuf_iterator<char>(file), {});
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(16 << 20);
  arguments.SetServiceConfigJSON(kServiceConfig);
  return grpc::CreateCustomChannel(address, credentials, arguments);
}

grpc::Status CheckHealth(grpc::health::v1::Health::Stub& health) {
  grpc::ClientContext context;
  SetTimeout(context, std::chrono::seconds(5));
  grpc::health::v1::HealthCheckRequest request;
  grpc::health::v1::HealthCheckResponse response;
  request.set_service("hocket.v1.RouterService");
  const auto status = health.Check(&context, request, &response);
  if (status.ok()) std::cout << "health: " << response.ServingStatus_Name(response.status()) << std::endl;
  return status;
}

grpc::Status ListMixtures(hocket::v1::RouterService::Stub& router) {
  hocket::v1::ListMixturesRequest request;
  do {
    grpc::ClientContext context;
    SetTimeout(context, std::chrono::seconds(5));
    hocket::v1::ListMixturesResponse page;
    const auto status = router.ListMixtures(&context, request, &page);
    if (!status.ok()) return status;
    for (const auto& mixture : page.mixtures()) {
      std::cout << "model: " << mixture.name() << ", experts: " << mixture.expert_count() << std::endl;
    }
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  return grpc::Status::OK;
}

grpc::Status Predict(hocket::v1::RouterService::Stub& router, const std::string& model, const Rows& rows) {
  grpc::ClientContext context;
  SetTimeout(context, std::chrono::seconds(10));
  hocket::v1::PredictRequest request;
  request.set_model(model);
  *request.mutable_input() = ToTensor(rows);
  request.set_partials(true);
  const auto stream = router.Predict(&context, request);
  for (hocket::v1::PredictResponse response; stream->Read(&response);) {
    if (response.has_plan()) {
      std::string labels;
      for (const auto& label : response.plan().labels()) labels += (labels.empty() ? "" : ", ") + label;
      if (!labels.empty()) std::cout << "labels: " << labels << std::endl;
      for (const auto& expert : response.plan().experts()) {
        std::cout << "plan: " << expert.expert() << " rows " << Show(expert.rows()) << " weights "
                  << Show(expert.weights()) << std::endl;
      }
    } else if (response.has_partial()) {
      const auto& partial = response.partial();
      std::cout << "partial " << partial.sequence() << ": " << Show(ToRows(partial.value())) << " coverage "
                << Show(partial.coverage()) << std::endl;
    } else if (response.has_final()) {
      const auto& combination = response.final().combination();
      std::cout << "final: " << Show(ToRows(combination.value())) << " coverage " << Show(combination.coverage()) << " "
                << hocket::v1::FinishReason_Name(response.final().finish().reason()) << std::endl;
    }
  }
  return stream->Finish();
}

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "ask ROUTER MODEL ROW...\n";
    return 2;
  }
  Rows rows;
  for (int index = 3; index < count; ++index) {
    std::istringstream text(arguments[index]);
    rows.emplace_back();
    for (float value; text >> value; text.ignore()) rows.back().push_back(value);
  }
  const auto channel = Connect(arguments[1]);
  const auto router = hocket::v1::RouterService::NewStub(channel);
  const auto health = grpc::health::v1::Health::NewStub(channel);
  auto status = CheckHealth(*health);
  if (status.ok()) status = ListMixtures(*router);
  if (status.ok()) status = Predict(*router, arguments[2], rows);
  if (status.ok()) return 0;
  std::cerr << Describe(status) << std::endl;
  return 1;
}
